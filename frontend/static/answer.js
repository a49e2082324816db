// One answer while it comes: what is thought and what is said in it, how fast it is, and how all that is shown.

import { GrowingText } from "./text.js";

const OPENING = "<think>";
const CLOSING = "</think>";

/** Tells thoughts from the answer in a text that may have just begun. */
export function splitThoughts(text) {
  const begun = text.trimStart();
  if (begun.length < OPENING.length && begun && OPENING.startsWith(begun)) return { thought: "", said: "" };
  if (!begun.startsWith(OPENING)) return { thought: "", said: text };
  const [thought, ...rest] = begun.slice(OPENING.length).split(CLOSING);
  return { thought: thought.trim(), said: rest.join(CLOSING).trimStart() };
}

const whole = new Intl.NumberFormat("en");

export class Answer {
  /** @param {HTMLElement} log where the answer is appended. */
  constructor(log) {
    this.content = "";
    this.reasoning = "";
    this.tokens = 0;
    this.usage = null;
    this.reason = null;
    this.asked = performance.now();
    this.first = this.last = null;
    this.tokensInFirst = 0;
    this.node = document.createElement("article");
    this.node.className = "answer pending";
    this.node.setAttribute("aria-label", "Answer");
    log.append(this.node);
    this.frame = 0;
  }

  get parts() {
    const { thought, said } = splitThoughts(this.content);
    return { thought: this.reasoning.trim() || thought, said };
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const tokens = choice.token_ids?.length ?? 0;
    if (tokens || choice.delta.content) {
      this.last = performance.now();
      if (this.first === null) {
        this.first = this.last;
        this.tokensInFirst = tokens;
      }
    }
    this.tokens += tokens;
    this.content += choice.delta.content ?? "";
    this.reasoning += choice.delta.reasoning_content ?? choice.delta.reasoning ?? "";
    this.reason = choice.finish_reason ?? this.reason;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  show() {
    this.frame = 0;
    const { thought, said } = this.parts;
    if (thought || said) this.node.classList.remove("pending");
    if (thought) {
      if (!this.thoughts) {
        this.thoughts = document.createElement("details");
        this.thoughts.open = true;
        const body = document.createElement("div");
        this.thoughts.append(Object.assign(document.createElement("summary"), { textContent: "Thoughts" }), body);
        this.node.prepend(this.thoughts);
        this.thoughtText = new GrowingText(body);
      }
      this.thoughtText.show(thought);
    }
    if (said) {
      if (!this.said) {
        const body = document.createElement("div");
        body.className = "said";
        this.node.append(body);
        this.said = new GrowingText(body);
      }
      this.said.show(said);
    }
    this.onshow?.();
  }

  /** Ends the answer. `note` says how, if it did not end by itself. */
  end(note) {
    cancelAnimationFrame(this.frame);
    this.show();
    this.node.classList.remove("pending");
    const line = document.createElement("p");
    line.className = "figures";
    const parts = [note ?? (this.reason === "length" ? "cut off" : null), ...this.figures()].filter(Boolean);
    line.textContent = parts.join(" · ");
    this.node.append(line);
    this.onshow?.();
  }

  figures() {
    const count = this.usage?.completion_tokens ?? this.tokens;
    if (!count || this.first === null) return ["no tokens"];
    const seconds = (this.last - this.first) / 1000;
    const figures = [`${whole.format(count)} token${count === 1 ? "" : "s"}`];
    // Between tokens: how long the first took depends on the prompt, and is said apart.
    if (seconds > 0) figures.push(`${whole.format(Math.round((count - this.tokensInFirst) / seconds))} tokens/s`);
    figures.push(`first after ${whole.format(Math.round(this.first - this.asked))} ms`);
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      figures.push(`prompt ${whole.format(this.usage.prompt_tokens)}${cached ? `, ${whole.format(cached)} cached` : ""}`);
    }
    return figures;
  }
}

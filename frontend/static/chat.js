// The conversation: sends what is typed, shows the answer as it comes, and keeps both for the next question.

import { ApiError, streamChat } from "./api.js";
import { Answer } from "./answer.js";

export class Chat {
  constructor(options) {
    this.options = options;
    this.log = document.getElementById("log");
    this.welcome = document.getElementById("welcome");
    this.composer = document.getElementById("composer");
    this.message = document.getElementById("message");
    this.send = document.getElementById("send");
    this.announcer = document.getElementById("announcer");
    this.turns = [];
    this.running = null;
    this.isAtEnd = true;
    this.scrollTop = 0;

    this.log.addEventListener("scroll", () => this.scrolled());
    new ResizeObserver(() => this.follow()).observe(this.log);
    this.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop();
      else this.ask(this.message.value);
    });
    this.message.addEventListener("keydown", (event) => {
      // While a character is being composed, Enter belongs to that.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) this.ask(this.message.value);
    });
    this.message.addEventListener("input", () => this.fitMessage());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    document.getElementById("clear").addEventListener("click", () => this.clear());
    document.getElementById("suggestions").addEventListener("click", (event) => {
      if (!event.target.matches("button")) return;
      this.ask(event.target.textContent);
      // The button is gone, and with it the focus.
      this.message.focus();
    });
  }

  async ask(text) {
    if (!text.trim() || this.running) return;
    let fields;
    this.options.clearError();
    try {
      fields = this.options.fields();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.options.showError(error);
      return;
    }
    this.welcome.hidden = true;
    const question = document.createElement("article");
    question.className = "question";
    question.setAttribute("aria-label", "Question");
    question.textContent = text;
    this.log.append(question);
    this.setMessage("");
    const answer = new Answer(this.log);
    answer.onshow = () => this.follow();
    this.isAtEnd = true;
    this.follow();

    const asked = { role: "user", content: text };
    const system = this.options.system ? [{ role: "system", content: this.options.system }] : [];
    const body = {
      messages: [...system, ...this.turns, asked],
      stream: true,
      stream_options: { include_usage: true },
      // Counts the tokens of an answer that is stopped, for which no usage comes.
      return_token_ids: true,
      ...fields,
    };
    const running = new AbortController();
    this.setRunning(running);
    let note = null;
    try {
      for await (const chunk of streamChat(body, this.options.key, running.signal)) answer.take(chunk);
    } catch (error) {
      if (error.name === "AbortError") note = "stopped";
      else if (error instanceof ApiError) note = this.fail(error, answer, question, text);
      else throw error;
    } finally {
      // Clearing may have begun another conversation meanwhile.
      if (this.running === running) this.setRunning(null);
    }
    if (note === "refused" || !answer.node.isConnected) return;
    answer.end(note);
    const { said } = answer.parts;
    // An answer that was stopped while still thinking says nothing to build upon.
    if (said) this.turns.push(asked, { role: "assistant", content: said });
    this.announcer.textContent = `${note === "stopped" ? "Stopped" : "Answer"}: ${said}`;
  }

  /** Shows an error. Returns "refused" if nothing was answered, in which case the question goes back to be changed. */
  fail(error, answer, question, text) {
    const line = document.createElement("p");
    line.className = "error";
    line.setAttribute("role", "alert");
    line.textContent = error.message;
    if (answer.content || answer.reasoning) {
      answer.node.append(line);
      return "broken off";
    }
    answer.node.remove();
    question.remove();
    if (!this.message.value) this.setMessage(text);
    const key = error.status === 401 ? new ApiError(error.message, "key") : error;
    if (this.options.showError(key)) {
      this.welcome.hidden = this.log.querySelector("article") !== null;
      return "refused";
    }
    if (error.param === "messages" && this.turns.length) line.append(" Clear begins a new conversation.");
    this.log.querySelector(":scope > .error")?.remove();
    this.log.append(line);
    this.isAtEnd = true;
    this.follow();
    return "refused";
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.setRunning(null);
    this.turns = [];
    for (const node of [...this.log.children]) if (node !== this.welcome) node.remove();
    this.welcome.hidden = false;
    this.announcer.textContent = "The conversation is cleared.";
    this.message.focus();
  }

  setRunning(running) {
    this.running = running;
    this.send.textContent = running ? "Stop" : "Send";
    this.log.setAttribute("aria-busy", String(running !== null));
    if (running) this.log.querySelector(":scope > .error")?.remove();
  }

  setMessage(text) {
    this.message.value = text;
    this.fitMessage();
  }

  fitMessage() {
    this.message.style.height = "auto";
    this.message.style.height = `${this.message.scrollHeight + 2}px`;
  }

  /** Keeps the end of the conversation in view, unless someone has scrolled up to read. */
  follow() {
    if (this.isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.log;
    if (scrollTop + clientHeight > scrollHeight - 40) this.isAtEnd = true;
    else if (scrollTop < this.scrollTop) this.isAtEnd = false;
    this.scrollTop = scrollTop;
  }
}

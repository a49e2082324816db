// The form of options: what it says for a request, what it remembers, and which field an error is about.

import { ApiError } from "./api.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const WHOLE = ["top_k", "max_tokens", "seed"];
const REMEMBERED = [...NUMBERS, "system", "stop"];

export class Options {
  constructor(form, summary, errorLine) {
    this.form = form;
    this.summary = summary;
    this.errorLine = errorLine;
    this.restore();
    form.addEventListener("input", () => this.changed());
    form.addEventListener("reset", () => {
      // The key is not the model's business. The fields are emptied right after this.
      const { key } = this;
      setTimeout(() => {
        this.form.elements.key.value = key;
        this.changed();
      });
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    this.changed();
  }

  get key() {
    return this.form.elements.key.value;
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  /** The fields of a request. Throws ApiError if one of them does not hold what it should. */
  fields() {
    const fields = {};
    for (const name of NUMBERS) {
      const { value, validity } = this.form.elements[name];
      const number = Number(value);
      if (validity.badInput) throw new ApiError(`${name} must be a number.`, name);
      if (value === "") continue;
      if (WHOLE.includes(name) && !Number.isSafeInteger(number)) {
        throw new ApiError(`${name} must be a whole number of at most 16 digits, got ${value}.`, name);
      }
      fields[name] = number;
    }
    const stop = this.form.elements.stop.value.split("\n").filter(Boolean);
    if (stop.length) fields.stop = stop.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
    if (this.form.elements.no_thinking.checked) fields.chat_template_kwargs = { enable_thinking: false };
    return fields;
  }

  /** Marks the field that an error is about. Returns whether it is one of this form's. */
  showError(error) {
    const field = this.form.elements[error.param === "max_completion_tokens" ? "max_tokens" : error.param];
    if (!field || !(REMEMBERED.includes(field.name) || field.name === "key")) return false;
    this.errorLine.textContent = error.message;
    this.errorLine.hidden = false;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", this.errorLine.id);
    this.form.closest("details").open = true;
    field.focus();
    return true;
  }

  clearError() {
    this.errorLine.hidden = true;
    for (const field of this.form.querySelectorAll("[aria-invalid]")) {
      field.removeAttribute("aria-invalid");
      field.removeAttribute("aria-describedby");
    }
  }

  changed() {
    this.clearError();
    const parts = NUMBERS.filter((name) => this.form.elements[name].value !== "").map(
      (name) => `${name.replace("_", "-").replace("max-tokens", "max")} ${this.form.elements[name].value}`,
    );
    if (this.system) parts.push("system prompt");
    if (this.form.elements.stop.value) parts.push("stop");
    if (this.form.elements.no_thinking.checked) parts.push("no thinking");
    this.summary.textContent = parts.length ? parts.join(", ") : "the model's own values";
    this.remember();
  }

  remember() {
    const values = Object.fromEntries(REMEMBERED.map((name) => [name, this.form.elements[name].value]));
    values.no_thinking = this.form.elements.no_thinking.checked;
    try {
      localStorage.setItem("options", JSON.stringify(values));
      // A key goes with the tab.
      sessionStorage.setItem("key", this.key);
    } catch {
      // Storage can be switched off; the values then last as long as the page.
    }
  }

  restore() {
    try {
      const values = JSON.parse(localStorage.getItem("options") ?? "{}");
      for (const name of REMEMBERED) this.form.elements[name].value = values[name] ?? "";
      this.form.elements.no_thinking.checked = values.no_thinking === true;
      this.form.elements.key.value = sessionStorage.getItem("key") ?? "";
    } catch {
      // As above, or not ours.
    }
  }
}

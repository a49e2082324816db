// The live view: asks for /health and /metrics once a second while the page is visible, and draws what they say.

import { headers } from "./api.js";
import { Chart } from "./chart.js";
import { point, snapshot } from "./metrics.js";

const SECONDS = 120;
const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;

const CHARTS = [
  { title: "Generated tokens", unit: "tokens/s", series: [{ key: "generated" }], floor: 10 },
  { title: "Prompt tokens", unit: "tokens/s", series: [{ key: "prompt" }], floor: 10 },
  { title: "Time to first token, mean", unit: "ms", series: [{ key: "first" }], scale: 1000, floor: 10, dots: true },
  {
    title: "Requests",
    unit: "requests",
    series: [{ key: "running", name: "running" }, { key: "waiting", name: "waiting" }],
    floor: 2,
  },
  { title: "KV cache in use", unit: "%", series: [{ key: "cache" }], scale: 100, floor: 1, ceiling: 100 },
  { title: "Prefix-cache hits", unit: "%", series: [{ key: "hitRate" }], scale: 100, floor: 100, ceiling: 100, dots: true },
];

const STATES = {
  ready: "Ready",
  starting: "Starting",
  stopping: "Stopping",
  failed: "Failed",
  unreachable: "Not reachable",
};

export class Engine {
  constructor(options) {
    this.options = options;
    this.state = document.getElementById("state");
    this.stateText = document.getElementById("state-text");
    this.notice = document.getElementById("notice");
    this.charts = CHARTS.map((what) => new Chart(document.getElementById("charts"), what, SECONDS));
    this.points = [];
    this.before = null;
    this.timer = null;
    this.isAsking = false;
    document.addEventListener("visibilitychange", () => this.start());
  }

  /** Looks now and then every second, until the page is hidden. */
  start() {
    clearTimeout(this.timer);
    if (!document.hidden && !this.isAsking) this.look();
  }

  async look() {
    this.isAsking = true;
    const begun = performance.now();
    try {
      await this.ask();
    } finally {
      this.isAsking = false;
    }
    if (document.hidden) {
      // The time that nobody looked at is a gap, not one long second.
      this.before = null;
      return;
    }
    this.timer = setTimeout(() => this.look(), Math.max(0, PERIOD_MS - (performance.now() - begun)));
  }

  async ask() {
    const asking = { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" };
    let health;
    try {
      const response = await fetch("health", asking);
      health = await response.json();
    } catch {
      this.show("unreachable", "The engine does not answer. Once it is started again, this goes on by itself.");
      this.before = null;
      return;
    }
    if (health.status !== "ready") {
      this.show(health.status, `No answers at the moment: ${health.reason}.`);
      this.before = null;
      return;
    }
    try {
      const response = await fetch("metrics", {
        ...asking,
        headers: { Accept: "text/plain", ...headers(this.options.key) },
      });
      if (!response.ok) throw new Error(`The engine's figures cannot be read: status ${response.status}.`);
      const now = snapshot(await response.text(), performance.now() / 1000);
      this.add(point(this.before, now));
      this.before = now;
      this.show("ready", "");
    } catch (error) {
      this.before = null;
      this.show("ready", error.message);
    }
  }

  add(point) {
    this.points.push(point);
    this.points = this.points.filter(({ time }) => point.time - time <= SECONDS);
    for (const chart of this.charts) chart.show(this.points, point.time);
  }

  show(state, notice) {
    const text = STATES[state] ?? state;
    if (this.stateText.textContent !== text) this.stateText.textContent = text;
    if (this.state.dataset.state !== state) {
      this.state.dataset.state = state;
      if (state === "ready") this.onready?.();
    }
    if (this.notice.textContent !== notice) this.notice.textContent = notice;
    this.notice.hidden = !notice;
  }
}

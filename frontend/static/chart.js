// A line chart of the last minutes, in SVG: axes with units, one or two series, gaps where nothing is known.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 8, bottom: 18, left: 40 };
const HEIGHT = 126;

function svg(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/** The smallest of 1, 2, 4, 10, 20, 40, … that is at least `value`; its half is whole from 2 on. */
export function niceCeiling(value) {
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 10].map((digit) => digit * scale).find((limit) => limit >= value * (1 - 1e-9));
}

const formats = [0, 1, 2].map((digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits }));

export function shown(value) {
  if (value === null) return "–";
  const digits = value >= 100 || value === 0 ? 0 : value >= 10 ? 1 : 2;
  return formats[digits].format(value);
}

export class Chart {
  /**
   * @param {object} what title, unit, series `[{ key, name }]` of points, `scale` from a point's value to the unit,
   *   `floor` and `ceiling`: the least and the most that the vertical axis ends with, `dots`: values are single events.
   */
  constructor(container, what, seconds) {
    this.what = { scale: 1, ceiling: Infinity, dots: false, ...what };
    this.seconds = seconds;
    this.points = [];
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.append(Object.assign(document.createElement("span"), { className: "title", textContent: what.title }));
    this.values = what.series.map(({ name }, index) => {
      const value = document.createElement("span");
      value.className = `value series-${index}`;
      const number = document.createElement("b");
      value.append(number, ` ${name ?? what.unit}`);
      caption.append(value);
      return number;
    });
    this.svg = svg("svg", { role: "img", height: HEIGHT });
    figure.dataset.chart = what.series[0].key;
    figure.classList.toggle("keyed", what.series.length > 1);
    figure.append(caption, this.svg);
    container.append(figure);
    this.width = 0;
    new ResizeObserver(([entry]) => {
      this.width = Math.floor(entry.contentRect.width);
      this.draw();
    }).observe(figure);
  }

  /** Shows points, oldest first, up to `now` in seconds. */
  show(points, now) {
    this.points = points;
    this.now = now;
    this.draw();
  }

  latest(key) {
    const known = this.points.filter((point) => point[key] !== null);
    if (!known.length) return null;
    // An event's value stands until the next one; anything else is of now or not known.
    const last = known.at(-1);
    return this.what.dots || last === this.points.at(-1) ? last[key] * this.what.scale : null;
  }

  draw() {
    const { what, width } = this;
    const { series, unit, scale } = what;
    const latest = series.map(({ key }) => this.latest(key));
    latest.forEach((value, index) => {
      this.values[index].textContent = shown(value);
    });
    const spoken = latest.map((value, i) => `${value === null ? "not known" : shown(value)} ${series[i].name ?? unit}`);
    this.svg.setAttribute("aria-label", `${what.title}, now ${spoken.join(", ")}`);
    if (width < 80 || this.now === undefined) return;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const most = Math.max(what.floor, ...this.points.flatMap((p) => series.map(({ key }) => (p[key] ?? 0) * scale)));
    const top = Math.min(niceCeiling(most), what.ceiling);
    const x = (time) => MARGIN.left + inner.width * (1 - (this.now - time) / this.seconds);
    const y = (value) => MARGIN.top + inner.height * (1 - Math.min(value, top) / top);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("width", width);
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(top * share)) + 0.5;
      parts.push(svg("line", { class: share ? "grid" : "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
      parts.push(svg("text", { class: "tick", x: MARGIN.left - 6, y: at + 3.5, "text-anchor": "end" }, tick(top * share)));
    }
    for (const [share, label, anchor] of [[0, `−${this.seconds} s`, "start"], [0.5, `−${this.seconds / 2} s`, "middle"], [1, "now", "end"]]) {
      parts.push(svg("text", { class: "tick", x: MARGIN.left + inner.width * share, y: HEIGHT - 3, "text-anchor": anchor }, label));
    }
    // The first series is drawn last, above the other.
    for (let index = series.length - 1; index >= 0; index--) {
      for (const run of this.runs(series[index].key)) {
        const corners = run.map((p) => `${x(p.time).toFixed(1)},${y(p[series[index].key] * scale).toFixed(1)}`);
        if (!what.dots && run.length > 1) {
          const [from, to] = [x(run[0].time), x(run.at(-1).time)].map((at) => at.toFixed(1));
          parts.push(svg("path", { class: `area series-${index}`, d: `M${from},${y(0)}L${corners.join("L")}L${to},${y(0)}Z` }));
        }
        if (run.length > 1) parts.push(svg("path", { class: `line series-${index}`, d: `M${corners.join("L")}` }));
        const dotted = what.dots ? run : run.length === 1 ? run : [];
        for (const p of dotted) {
          parts.push(svg("circle", { class: `dot series-${index}`, cx: x(p.time), cy: y(p[series[index].key] * scale), r: 2 }));
        }
      }
    }
    this.svg.replaceChildren(...parts);
  }

  /** Stretches of neighbouring points whose value is known. */
  runs(key) {
    const runs = [];
    let before = null;
    for (const p of this.points) {
      if (p[key] === null) continue;
      // Events may lie apart; the values of everything else come every second, and a gap is a time not looked at.
      if (before === null || (!this.what.dots && p.time - before.time > 5)) runs.push([]);
      runs.at(-1).push(p);
      before = p;
    }
    return runs;
  }
}

function tick(value) {
  if (value >= 1e6) return `${value / 1e6}M`;
  return value >= 1e4 ? `${value / 1e3}k` : formats[2].format(value);
}

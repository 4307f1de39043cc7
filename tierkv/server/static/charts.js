/** Four small charts over the same two minutes; the pointer reads all of them at one moment. */

import { count, element, percent, setText, speed } from "./format.js";
import { resolved } from "./theme.js";

const SPAN_S = 120;
const GAP_S = 6; // a longer silence is a gap, not a line

const CHARTS = [
  { title: "Generated", unit: "tok/s", fields: ["generated"], colors: ["--gpu"], value: ([v]) => speed(v) },
  { title: "Prompt computed", unit: "tok/s", fields: ["prompt"], colors: ["--filling"], value: ([v]) => speed(v) },
  {
    title: "Found in cache", unit: "%", fields: ["hit_gpu", "hit_cpu", "hit_nvme"],
    colors: ["--gpu", "--cpu", "--nvme"], names: ["gpu", "cpu", "nvme"], stacked: true, top: 1,
    value: (values) => (values[0] == null ? "–" : percent(values.reduce((a, b) => a + b, 0))),
    part: (value) => (value == null ? "–" : percent(value)),
  },
  {
    title: "Sequences", unit: "running", fields: ["running", "queued"], colors: ["--gpu", "--draining"],
    names: ["running", "queued"], value: ([v]) => (v == null ? "–" : count(v)),
    part: (value) => (value == null ? "–" : count(value)), shown: [1],
  },
];

class Chart {
  constructor(spec, fieldNames) {
    this.spec = spec;
    this.indices = spec.fields.map((field) => fieldNames.indexOf(field));
    this.value = element("b", {}, "–");
    this.canvas = element("canvas", { role: "img" });
    const shown = spec.shown ?? (spec.names ?? []).map((_, index) => index);
    this.parts = shown.map((index) => [index, element("span")]);
    for (const [index, span] of this.parts) span.style.setProperty("--part", `var(${spec.colors[index]})`);
    this.root = element("div", { className: "chart" },
      element("div", { className: "chart-head" }, element("h3", {}, spec.title),
        element("span", { className: "parts" }, ...this.parts.map(([, span]) => span)),
        this.value, element("span", { className: "unit" }, spec.unit)),
      element("div", { className: "plot" }, this.canvas));
  }

  recolor() {
    this.colors = this.spec.colors.map((name) => resolved(document.body, name));
    this.line = resolved(document.body, "--line");
    this.muted = resolved(document.body, "--muted");
  }

  /** The figures in the heading, of one sample. */
  show(sample) {
    const values = this.indices.map((index) => (sample ? sample[index] : null));
    setText(this.value, this.spec.value(values));
    for (const [index, span] of this.parts) {
      setText(span, `${this.spec.names[index]} ${this.spec.part(values[index])}`);
    }
    this.canvas.setAttribute("aria-label", `${this.spec.title}: ${this.value.textContent} ${this.spec.unit}`);
  }

  draw(samples, end, cursor) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !this.colors) return;
    const ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    this.frame(context, width, height);
    const top = this.top(samples);
    const x = (t) => width - ((end - t) / SPAN_S) * width;
    const y = (value) => height - 1 - (value / top) * (height - 5);
    for (const layer of this.indices.keys()) this.layer(context, samples, layer, x, y, height);
    if (!this.spec.stacked && top > 0) this.scale(context, top, width);
    if (cursor) {
      context.fillStyle = this.muted;
      context.fillRect(x(cursor[0]), 0, 1, height);
    }
  }

  frame(context, width, height) {
    context.fillStyle = this.line;
    context.fillRect(0, height - 1, width, 1);
    context.globalAlpha = 0.6;
    context.fillRect(Math.round(width / 2), 0, 1, height);
    context.globalAlpha = 1;
  }

  scale(context, top, width) {
    context.fillStyle = this.muted;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "top";
    context.textAlign = "left";
    context.fillText(top >= 10 ? count(top) : top.toFixed(top < 1 ? 1 : 0), 2, 1, width);
  }

  top(samples) {
    if (this.spec.top) return this.spec.top;
    let most = 1;
    for (const sample of samples) for (const index of this.indices) most = Math.max(most, sample[index] ?? 0);
    return roundUp(most);
  }

  layer(context, samples, layer, x, y, height) {
    const at = (sample) => {
      const value = sample[this.indices[layer]];
      if (value == null || !this.spec.stacked) return [value, null];
      const floor = this.indices.slice(0, layer).reduce((sum, index) => sum + sample[index], 0);
      return [floor + value, floor];
    };
    for (const run of runs(samples, at)) {
      const path = new Path2D();
      run.forEach(([t, value], i) => path[i ? "lineTo" : "moveTo"](x(t), y(value)));
      const area = new Path2D(path);
      for (const [t, , floor] of run.toReversed()) area.lineTo(x(t), floor == null ? height - 1 : y(floor));
      context.fillStyle = context.strokeStyle = this.colors[layer];
      context.globalAlpha = this.spec.stacked ? 0.75 : 0.13;
      context.fill(area);
      context.globalAlpha = 1;
      context.lineWidth = 1.5;
      context.lineJoin = "round";
      if (!this.spec.stacked) context.stroke(path);
    }
  }
}

/** Stretches of samples without a gap, as [time, value, what it stands on]. */
function runs(samples, at) {
  const found = [];
  let last = -Infinity;
  for (const sample of samples) {
    const [value, floor] = at(sample);
    if (value == null) last = -Infinity;
    else {
      if (sample[0] - last > GAP_S) found.push([]);
      found.at(-1).push([sample[0], value, floor]);
      last = sample[0];
    }
  }
  return found.filter((run) => run.length > 1);
}

/** The next round number. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

export class Charts {
  constructor(root, note) {
    this.root = root;
    this.note = note;
    this.samples = [];
    this.charts = [];
    this.cursor = null;
    root.addEventListener("pointermove", (event) => this.point(event));
    root.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  /** A connection begins with what others have seen of the last minutes. */
  greet(hello) {
    if (!this.charts.length) {
      this.charts = CHARTS.map((spec) => new Chart(spec, hello.sample));
      this.root.replaceChildren(...this.charts.map((chart) => chart.root));
      this.recolor();
    }
    this.samples = hello.history;
  }

  add(sample) {
    const last = this.samples.at(-1);
    if (last && sample[0] <= last[0]) return;
    this.samples.push(sample);
    while (this.samples.length && this.samples[0][0] < sample[0] - SPAN_S) this.samples.shift();
    this.draw();
  }

  recolor() {
    for (const chart of this.charts) chart.recolor();
    this.draw();
  }

  point(event) {
    this.cursor = null;
    const end = this.samples.at(-1)?.[0];
    if (event && end) {
      const box = this.root.getBoundingClientRect();
      const t = end - SPAN_S * (1 - (event.clientX - box.left) / box.width);
      this.cursor = this.samples.reduce((a, b) => (Math.abs(b[0] - t) < Math.abs(a[0] - t) ? b : a));
      if (Math.abs(this.cursor[0] - t) > GAP_S) this.cursor = null;
    }
    setText(this.note, this.cursor ? `${Math.round(end - this.cursor[0])} s ago` : "");
    this.draw();
  }

  draw() {
    const last = this.samples.at(-1);
    for (const chart of this.charts) {
      chart.show(this.cursor ?? last);
      chart.draw(this.samples, last?.[0] ?? 0, this.cursor);
    }
  }
}

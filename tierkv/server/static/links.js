/** The links between the tiers, drawn from card to card, with what flows through them. */

import { bytesPerSecond } from "./format.js";
import { isStill } from "./theme.js";

const SVG = "http://www.w3.org/2000/svg";
const ORDER = ["gpu", "cpu", "nvme"];
const LANE = 15; // from the middle of a link to each of its two lanes

function node(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

/** One direction of one link: a pipe, blocks that move along it, an arrow head and a label. */
class Lane {
  constructor(svg, from, to) {
    this.from = from;
    this.to = to;
    this.group = node("g", { "data-from": from, "data-to": to }, svg);
    this.pipe = node("path", { class: "pipe" }, this.group);
    this.flow = node("path", { class: "flow" }, this.group);
    this.head = node("path", { class: "head", d: "M-7-4.5 0 0-7 4.5z" }, this.group);
    this.label = node("text", {}, this.group);
    this.motion = this.flow.animate([{ strokeDashoffset: 15 }, { strokeDashoffset: 0 }], {
      duration: 900,
      iterations: Infinity,
    });
  }

  place({ path, end, angle, label, turn }) {
    this.pipe.setAttribute("d", path);
    this.flow.setAttribute("d", path);
    this.head.setAttribute("transform", `translate(${end}) rotate(${angle})`);
    this.label.setAttribute("transform", `translate(${label}) rotate(${turn ?? 0})`);
  }

  /** Faster and broader with the speed, by orders of magnitude. */
  update(speed) {
    this.speed = speed;
    const [value, unit] = bytesPerSecond(speed);
    const part = Math.min(1, Math.max(0, Math.log10(Math.max(speed, 1) / 1e4) / 6));
    this.group.toggleAttribute("data-flows", speed > 0);
    this.flow.style.strokeWidth = 4 + 4 * part;
    this.motion.updatePlaybackRate(0.5 + 2.5 * part);
    if (speed > 0 && !isStill()) this.motion.play();
    else this.motion.pause();
    if (this.label.dataset.text === value + unit) return;
    this.label.dataset.text = value + unit;
    this.label.replaceChildren(`${value} `);
    const small = node("tspan", { class: "unit" }, this.label);
    small.textContent = unit;
  }
}

export class Links {
  constructor(stage, svg, summary) {
    this.stage = stage;
    this.svg = svg;
    this.summary = summary;
    this.lanes = new Map();
    new ResizeObserver(() => this.layout()).observe(stage);
  }

  update(snapshot) {
    const tiers = ORDER.filter((name) => snapshot.tiers.some((tier) => tier.name === name));
    if (tiers.join() !== this.tiers) this.build(tiers);
    const found = new Map(snapshot.links.map((link) => [`${link.source}>${link.destination}`, link]));
    for (const [name, lane] of this.lanes) lane.update(found.get(name)?.bytes_per_s ?? 0);
    this.describe();
  }

  build(tiers) {
    this.tiers = tiers.join();
    this.svg.replaceChildren();
    this.lanes.clear();
    for (let i = 0; i < tiers.length; i += 1) {
      for (let j = i + 1; j < tiers.length; j += 1) {
        for (const [from, to] of [[tiers[j], tiers[i]], [tiers[i], tiers[j]]]) {
          this.lanes.set(`${from}>${to}`, new Lane(this.svg, from, to));
        }
      }
    }
    this.layout();
  }

  /** For those who cannot see the lines. */
  describe() {
    const flowing = [...this.lanes.values()].filter((lane) => lane.speed > 0);
    const words = flowing.map((l) => `${l.from} to ${l.to} ${bytesPerSecond(l.speed).join(" ")}`);
    this.summary.textContent = words.length ? `Moving: ${words.join(", ")}` : "Nothing moves between the tiers.";
  }

  layout() {
    const origin = this.stage.getBoundingClientRect();
    const boxes = {};
    for (const card of this.stage.querySelectorAll(".tier")) {
      const box = card.getBoundingClientRect();
      boxes[card.dataset.tier] = {
        left: box.left - origin.left, right: box.right - origin.left,
        top: box.top - origin.top, bottom: box.bottom - origin.top,
      };
    }
    const names = ORDER.filter((name) => boxes[name]);
    const isRow = names.length < 2 || boxes[names[1]].left >= boxes[names[0]].right;
    for (const lane of this.lanes.values()) {
      if (!boxes[lane.from] || !boxes[lane.to]) continue;
      const isUp = ORDER.indexOf(lane.to) < ORDER.indexOf(lane.from);
      const [hot, cold] = isUp ? [boxes[lane.to], boxes[lane.from]] : [boxes[lane.from], boxes[lane.to]];
      const isDirect = names.length === 3 && lane.from !== "cpu" && lane.to !== "cpu";
      const shape = isRow ? (isDirect ? below : across) : isDirect ? beside : between;
      lane.place(shape(hot, cold, isUp));
    }
  }
}

/** Side by side: promotions above, demotions below. */
function across(hot, cold, isUp) {
  const middle = (Math.max(hot.top, cold.top) + Math.min(hot.bottom, cold.bottom)) / 2;
  const y = middle + (isUp ? -LANE : LANE);
  const [left, right] = [hot.right + 8, cold.left - 8];
  const label = `${(left + right) / 2} ${y + (isUp ? -15 : 16)}`;
  return isUp
    ? { path: `M${right} ${y}H${left + 5}`, end: `${left} ${y}`, angle: 180, label }
    : { path: `M${left} ${y}H${right - 5}`, end: `${right} ${y}`, angle: 0, label };
}

/** Side by side, past the tier in the middle: two brackets below it. */
function below(hot, cold, isUp) {
  const top = Math.max(hot.bottom, cold.bottom) + 6;
  const y = top + (isUp ? 14 : 36);
  const inset = isUp ? 46 : 18;
  const [left, right] = [hot.right - inset, cold.left + inset];
  const label = `${(left + right) / 2} ${y}`;
  const bend = 8;
  return isUp
    ? { path: `M${right} ${top}V${y - bend}q0 ${bend}-${bend} ${bend}H${left + bend}q-${bend} 0-${bend}-${bend}V${top + 5}`, end: `${left} ${top}`, angle: 270, label }
    : { path: `M${left} ${top}V${y - bend}q0 ${bend} ${bend} ${bend}H${right - bend}q${bend} 0 ${bend}-${bend}V${top + 5}`, end: `${right} ${top}`, angle: 270, label };
}

/** One above the other: promotions at the left, demotions at the right. */
function between(hot, cold, isUp) {
  const width = hot.right - hot.left;
  const x = hot.left + width * (isUp ? 0.16 : 0.6);
  const [top, bottom] = [hot.bottom + 7, cold.top - 7];
  const label = `${x + 52} ${(top + bottom) / 2}`;
  return isUp
    ? { path: `M${x} ${bottom}V${top + 5}`, end: `${x} ${top}`, angle: 270, label }
    : { path: `M${x} ${top}V${bottom - 5}`, end: `${x} ${bottom}`, angle: 90, label };
}

/** One above the other, past the tier in the middle: two brackets at its right. */
function beside(hot, cold, isUp) {
  const x = hot.right + (isUp ? 11 : 27);
  const [edge, inset, bend] = [hot.right + 4, isUp ? 40 : 18, 6];
  const [top, bottom] = [hot.bottom - inset, cold.top + inset];
  const label = `${x} ${(top + bottom) / 2}`;
  return isUp
    ? { path: `M${edge} ${bottom}H${x - bend}q${bend} 0 ${bend}-${bend}V${top + bend}q0-${bend}-${bend}-${bend}H${edge + 3}`, end: `${edge - 2} ${top}`, angle: 180, label, turn: 90 }
    : { path: `M${edge} ${top}H${x - bend}q${bend} 0 ${bend} ${bend}V${bottom - bend}q0 ${bend}-${bend} ${bend}H${edge + 3}`, end: `${edge - 2} ${bottom}`, angle: 180, label, turn: 90 };
}

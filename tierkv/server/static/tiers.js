/** The cards of the tiers: how full, what the blocks are, and a grid of them. */

import { bytes, count, element, percent, setText } from "./format.js";
import { Grid, KINDS } from "./grid.js";

const NAMES = { gpu: "GPU pool", cpu: "CPU", nvme: "NVMe" };
const WORDS = { in_use: "in use", cached: "cached", filling: "filling", draining: "draining", empty: "empty" };
const ORDER = ["in_use", "cached", "filling", "draining"];
const SHARED = 65535;

class Card {
  constructor(name, hello, tip, onPick) {
    this.name = name;
    this.hello = hello;
    this.size = element("span", { className: "size" });
    if (name === "gpu" && hello.device === "cpu") this.size.title = "in main memory: the model runs on the CPU";
    this.full = element("b", {}, "0");
    this.shares = Object.fromEntries(ORDER.map((kind) => [kind, element("i", { className: kind })]));
    this.canvas = element("canvas", { className: "cells", role: "img" });
    this.counts = Object.fromEntries([...ORDER, "empty"].map((kind) => [kind, element("b")]));
    this.root = element(
      "article",
      { className: "tier", data: { tier: name }, "aria-label": NAMES[name] },
      element("header", { className: "tier-head" },
        element("h3", {}, NAMES[name]), this.size,
        element("span", { className: "full", title: "of its blocks are occupied" }, this.full, " %")),
      element("div", { className: "shares", "aria-hidden": "true" }, ...Object.values(this.shares)),
      this.canvas,
      element("ul", { className: "counts" }, ...Object.entries(this.counts).map(([kind, node]) =>
        element("li", {}, element("i", { className: kind }), node, ` ${WORDS[kind]}`))),
    );
    this.grid = new Grid(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => tip.show(event, this.describe(event)));
    this.canvas.addEventListener("pointerleave", () => tip.hide());
    this.canvas.addEventListener("click", (event) => onPick(this.ownerAt(event)));
  }

  update(tier, requests, slotBytes) {
    this.tier = tier;
    this.requests = requests;
    this.owners = tier.owners ? new Uint16Array(unpack(tier.owners).buffer) : null;
    this.grid.update(unpack(tier.cells), this.owners, this.hello.levels);
    const used = tier.capacity - tier.empty;
    setText(this.full, percent(used / tier.capacity));
    setText(this.size, this.sizeText(tier, slotBytes));
    for (const kind of ORDER) this.shares[kind].style.width = `${(tier[kind] / tier.capacity) * 100}%`;
    for (const [kind, node] of Object.entries(this.counts)) {
      setText(node, count(tier[kind]));
      node.parentElement.toggleAttribute("data-none", tier[kind] === 0);
      node.parentElement.hidden = kind === "in_use" && this.name !== "gpu";
    }
    const numbers = Object.entries(WORDS).map(([kind, word]) => `${count(tier[kind])} ${word}`);
    this.canvas.setAttribute("aria-label", `${count(tier.capacity)} blocks: ${numbers.join(", ")}`);
  }

  sizeText(tier, slotBytes) {
    const parts = [`${count(tier.capacity)} blocks`];
    if (slotBytes) parts.push(bytes(tier.capacity * slotBytes).join(" "));
    else parts.push(`${count(tier.capacity * this.hello.block_size)} tokens`);
    return parts.join(" · ");
  }

  indexOf(event) {
    const box = this.canvas.getBoundingClientRect();
    return this.grid.at(event.clientX - box.left, event.clientY - box.top);
  }

  /** The id of the request that holds the block under the pointer, if one does. */
  ownerAt(event) {
    const index = this.indexOf(event);
    return index >= 0 && this.owners ? this.requests.get(this.owners[index])?.id ?? null : null;
  }

  describe(event) {
    const index = this.indexOf(event);
    if (index < 0 || !this.tier) return null;
    const size = this.tier.slots_per_cell;
    const first = index * size;
    const last = Math.min(first + size, this.tier.capacity) - 1;
    const kind = WORDS[KINDS[this.grid.cells[index] & 7]];
    const owner = this.owners ? this.owners[index] : 0;
    const holder = this.requests.get(owner)?.label;
    const whose = holder ?? (owner === SHARED ? "shared" : owner ? "another request" : null);
    const title = size === 1 ? `block ${count(first)}` : `blocks ${count(first)} to ${count(last)}`;
    return [title, size === 1 ? kind : `mostly ${kind}`, whose];
  }
}

/** All cards, made when the first snapshot says which tiers there are. */
export class Tiers {
  constructor(stage, tip, onPick) {
    this.stage = stage;
    this.tip = tip;
    this.onPick = onPick;
    this.cards = new Map();
    this.byOwner = false;
  }

  greet(hello) {
    this.hello = hello;
    for (const card of this.cards.values()) card.hello = hello;
  }

  update(snapshot, requests) {
    const names = snapshot.tiers.map((tier) => tier.name).join();
    if (names !== [...this.cards.keys()].join()) this.build(snapshot.tiers);
    for (const tier of snapshot.tiers) this.cards.get(tier.name).update(tier, requests, snapshot.slot_bytes);
  }

  build(tiers) {
    for (const node of this.stage.querySelectorAll(".tier, .alone")) node.remove();
    this.cards = new Map(tiers.map(({ name }) => [name, new Card(name, this.hello, this.tip, this.onPick)]));
    this.stage.dataset.count = tiers.length;
    for (const card of this.cards.values()) {
      this.stage.append(card.root);
      card.grid.recolor();
      card.grid.paintByOwner(this.byOwner);
    }
    if (tiers.length === 1) {
      const words = "There is no tier below the pool. Started with --offload cpu,nvme the server keeps what it computed there.";
      this.stage.append(element("p", { className: "alone" }, words));
    }
  }

  recolor() {
    for (const card of this.cards.values()) card.grid.recolor();
  }

  paintByOwner(yes) {
    this.byOwner = yes;
    for (const card of this.cards.values()) card.grid.paintByOwner(yes);
  }

  /** Light the cells of a request, by tier; null lights none. */
  light(cells) {
    for (const [name, card] of this.cards) card.grid.light(cells ? cells[name] ?? [] : null);
  }
}

function unpack(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** The note that follows the pointer. */
export class Tip {
  constructor(node) {
    this.node = node;
  }

  show(event, lines) {
    if (!lines) return this.hide();
    const [title, ...rest] = lines.filter(Boolean);
    this.node.replaceChildren(element("b", {}, title), ...rest.map((line) => element("span", {}, line)));
    this.node.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const left = Math.min(event.clientX + 14, innerWidth - width - 8);
    const top = event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18;
    this.node.style.transform = `translate(${Math.max(8, left)}px, ${top}px)`;
    return undefined;
  }

  hide() {
    this.node.hidden = true;
  }
}

/** What happened to the selected request: a lane for each sample, and the time in each phase. */

import { fetchWithKey } from "./key.js";
import { count, element, seconds, setText, shortId } from "./format.js";

const PERIOD_MS = 700;
const MOST_LANES = 8;
const WORDS = {
  queued: "queued", loading: "loading", prefill: "computing the prompt", decode: "decoding",
  preempted: "preempted", swapping: "swapping out", swapped: "swapped out",
};

/**
 * Phases of one sample from its events: [{phase, from, to, isChunk}].
 *
 * While it runs, pieces of the prompt are laid over what it does otherwise: waiting for its turn
 * until the first token, decoding after it.
 */
export function phasesOf(events, firstToken, end) {
  const base = [];
  const chunks = [];
  for (const [t, , kind, ...rest] of events) {
    if (kind === "chunk") chunks.push({ phase: "prefill", from: t, to: rest[0], isChunk: true });
    else {
      if (base.length) base.at(-1).to = t;
      if (kind !== "finished") base.push({ phase: kind, from: t, to: end });
    }
  }
  const running = base.flatMap((part) => {
    if (part.phase !== "running") return [part];
    const decodes = firstToken == null ? part.to : Math.min(Math.max(firstToken, part.from), part.to);
    return [{ phase: "prefill", from: part.from, to: decodes }, { phase: "decode", from: decodes, to: part.to }];
  });
  return [...running, ...chunks].filter((part) => part.to > part.from);
}

/** Seconds in each phase; what a piece of the prompt covers is not decoding. */
function totals(parts) {
  const sums = {};
  for (const { phase, from, to, isChunk } of parts) if (!isChunk) sums[phase] = (sums[phase] ?? 0) + to - from;
  const decodes = parts.filter((part) => part.phase === "decode");
  for (const chunk of parts.filter((part) => part.isChunk)) {
    for (const { from, to } of decodes) {
      const covered = Math.min(to, chunk.to) - Math.max(from, chunk.from);
      if (covered > 0) {
        sums.decode -= covered;
        sums.prefill = (sums.prefill ?? 0) + covered;
      }
    }
  }
  return sums;
}

export class Detail {
  /** @param {(cells: object | null) => void} onCells is told which cells hold its blocks. */
  constructor(nodes, onCells) {
    this.nodes = nodes;
    this.onCells = onCells;
    this.id = null;
    this.timer = 0;
    this.hint = nodes.hint.textContent;
  }

  open(id) {
    this.id = id;
    clearTimeout(this.timer);
    setText(this.nodes.hint, this.hint);
    this.nodes.hint.hidden = id !== null;
    this.nodes.body.hidden = true;
    if (id === null) this.onCells(null);
    else this.load(id);
  }

  async load(id) {
    let found = null;
    let isGone = false;
    try {
      const response = await fetchWithKey(`dashboard/request?id=${encodeURIComponent(id)}`);
      isGone = response.status === 404;
      if (response.ok) found = await response.json();
    } catch {
      found = null; // the stream tells about the connection; this one tries again
    }
    if (id !== this.id) return;
    if (found) this.show(found);
    else if (isGone) this.forgotten();
    const isOver = isGone || (found && found.ended_s != null);
    if (!isOver) this.timer = setTimeout(() => this.load(id), PERIOD_MS);
  }

  forgotten() {
    this.nodes.hint.hidden = false;
    this.nodes.body.hidden = true;
    this.onCells(null);
    setText(this.nodes.hint, "This request ended a while ago and is forgotten.");
  }

  show(found) {
    const end = found.ended_s ?? found.t;
    const span = Math.max(end - found.arrival_s, 1e-3);
    this.nodes.body.hidden = false;
    setText(this.nodes.id, shortId(found.request));
    setText(this.nodes.facts, factsOf(found));
    const numbers = [...new Set(found.events.map((event) => event[1]))].sort((a, b) => a - b).slice(0, MOST_LANES);
    const lanes = numbers.map((number) => phasesOf(found.events.filter((e) => e[1] === number), found.first_token_s, end));
    const last = found.events.filter((event) => event[2] === "finished").at(-1);
    this.nodes.lanes.replaceChildren(...lanes.map((parts) => lane(parts, found.arrival_s, span, found.ended_s != null)));
    this.nodes.axis.replaceChildren(element("span", {}, "0"), element("span", {}, seconds(span / 2)),
      element("span", {}, found.ended_s != null ? `${last?.[3] ?? "end"} after ${seconds(span)}` : `now, ${seconds(span)}`));
    this.nodes.phases.replaceChildren(...phaseList(lanes.flat(), found, lanes.length));
    this.onCells(found.ended_s == null ? found.cells : null);
  }
}

function factsOf(found) {
  const generated = found.generated_tokens.reduce((a, b) => a + b, 0);
  const parts = [`${count(found.prompt_tokens)} prompt tokens`];
  if (found.cached_tokens) parts.push(`${count(found.cached_tokens)} cached`);
  parts.push(`${count(generated)} generated`);
  if (found.num_sequences > 1) parts.push(`${count(found.num_sequences)} samples`);
  if (found.preemptions) parts.push(`preempted ${count(found.preemptions)}×`);
  return parts.join(" · ");
}

function lane(parts, start, span, isOver) {
  const place = (node, from, to) => {
    node.style.left = `${((from - start) / span) * 100}%`;
    node.style.width = `${((to - from) / span) * 100}%`;
    return node;
  };
  const pieces = parts.map((part) => {
    const node = element("i", { data: { phase: part.phase }, title: `${WORDS[part.phase] ?? part.phase} ${seconds(part.to - part.from)}` });
    if (part.isChunk) node.dataset.chunk = "";
    return place(node, part.from, part.to);
  });
  const root = element("div", { className: "lane", "aria-hidden": "true" }, ...pieces);
  if (isOver) {
    const mark = element("i", { className: "end" });
    mark.style.right = "0";
    root.append(mark);
  }
  return root;
}

function phaseList(parts, found, numLanes) {
  const sums = totals(parts);
  const chunks = parts.filter((part) => part.isChunk).length;
  const decoded = found.generated_tokens.reduce((a, b) => a + b, 0) - numLanes;
  return Object.keys(WORDS).filter((phase) => sums[phase] > 0).map((phase) => {
    let more = "";
    if (phase === "prefill" && chunks > 1) more = ` in ${count(chunks)} chunks`;
    if (phase === "decode" && decoded > 0) more = `, ${(decoded / (sums.decode / numLanes)).toFixed(1)} tok/s`;
    const text = element("span", {}, `${WORDS[phase]} `, element("b", {}, seconds(sums[phase] / numLanes)), more);
    return element("li", { data: { phase } }, text);
  });
}

/** The list of sequences: running, loading, queued, and the last that ended. */

import { count, element, seconds, setText, shortId } from "./format.js";

const TIERS = ["gpu", "cpu", "nvme"];

/** Rows of a snapshot as objects; samples of one request get a number. */
export function readRows(snapshot, fields) {
  const rows = snapshot.rows.map((values) => Object.fromEntries(fields.map((name, i) => [name, values[i]])));
  const times = new Map();
  for (const row of rows) times.set(row.request, (times.get(row.request) ?? 0) + 1);
  for (const row of rows) {
    row.name = shortId(row.request);
    row.sample = times.get(row.request) > 1 ? String(row.index + 1) : "";
    row.label = row.sample ? `${row.name} #${row.sample}` : row.name;
  }
  return rows;
}

class Row {
  constructor(onSelect) {
    this.state = element("span", { className: "state" });
    this.name = element("b");
    this.id = element("span", { className: "id" }, this.name);
    this.bars = Object.fromEntries(TIERS.map((tier) => [tier, element("i", { className: tier })]));
    this.places = element("span", { className: "places" });
    this.tokens = element("span", { className: "tokens" });
    this.age = element("span", { className: "age soft" });
    this.button = element("button", { className: "row", type: "button", tabIndex: -1 },
      this.state, this.id,
      element("span", { className: "blocks" },
        element("span", { className: "residency", "aria-hidden": "true" }, ...Object.values(this.bars)), this.places),
      this.tokens, this.age);
    this.root = element("li", {}, this.button);
    this.button.addEventListener("click", () => onSelect(this.row.request));
  }

  update(row, isSelected) {
    this.row = row;
    this.button.dataset.state = row.state;
    this.button.setAttribute("aria-pressed", String(isSelected));
    setText(this.state, row.state);
    setText(this.name, row.name);
    this.id.dataset.sample = row.sample;
    for (const tier of TIERS) this.bars[tier].style.width = row.blocks ? `${(row[tier] / row.blocks) * 100}%` : "0";
    this.bars.gpu.parentElement.hidden = row.state === "finished";
    setText(this.places, places(row));
    const grown = row.generated_tokens ? ` + ${count(row.generated_tokens)}` : "";
    setText(this.tokens, `${count(row.prompt_tokens)}${grown}`);
    this.tokens.title = `${count(row.prompt_tokens)} prompt tokens, ${count(row.cached_tokens)} of them cached; ` +
      `${count(row.generated_tokens)} of at most ${count(row.max_tokens)} generated`;
    setText(this.age, seconds(row.age_s));
  }
}

/** Where a sequence's blocks are: "38 gpu, 10 cpu", and what is in no tier. */
function places(row) {
  if (row.state === "finished") return "";
  const found = TIERS.filter((tier) => row[tier] > 0).map((tier) => `${count(row[tier])} ${tier}`);
  const missing = row.blocks - row.gpu - row.cpu - row.nvme;
  if (missing > 0) found.push(`${count(missing)} to compute`);
  return found.join(", ");
}

export class Requests {
  /** @param {(id: string) => void} onSelect */
  constructor({ list, empty, census }, onSelect) {
    this.list = list;
    this.empty = empty;
    this.census = census;
    this.onSelect = onSelect;
    this.rows = new Map();
    this.selected = null;
    list.addEventListener("keydown", (event) => this.onKey(event));
    list.addEventListener("focusin", (event) => this.onFocus(event.target));
  }

  update(rows, snapshot) {
    const focused = this.focusedRow();
    const keep = new Map();
    let before = null;
    for (const row of rows) {
      const key = `${row.request}#${row.index}`;
      const shown = this.rows.get(key) ?? new Row(this.onSelect);
      shown.update(row, row.request === this.selected);
      const place = before ? before.nextSibling : this.list.firstChild;
      if (shown.root !== place) this.list.insertBefore(shown.root, place);
      before = shown.root;
      keep.set(key, shown);
    }
    for (const [key, shown] of this.rows) if (!keep.has(key)) shown.root.remove();
    this.rows = keep;
    this.refocus(focused);
    this.empty.hidden = rows.length > 0;
    this.list.hidden = rows.length === 0;
    this.tellCounts(rows, snapshot);
    this.ensureTabStop();
  }

  /** The row that has the focus, and where it is. */
  focusedRow() {
    const button = document.activeElement;
    if (!this.list.contains(button)) return null;
    return { button, place: [...this.list.children].indexOf(button.parentElement) };
  }

  /** A row that was moved has lost the focus, and one that is gone leaves it to its neighbour. */
  refocus(focused) {
    if (!focused || document.activeElement === focused.button) return;
    const { children } = this.list;
    const near = children[Math.min(focused.place, children.length - 1)]?.firstChild;
    (focused.button.isConnected ? focused.button : near)?.focus({ preventScroll: true });
  }

  tellCounts(rows, snapshot) {
    const parts = [`${count(snapshot.running)} running`];
    if (snapshot.loading) parts.push(`${count(snapshot.loading)} loading`);
    if (snapshot.swapped) parts.push(`${count(snapshot.swapped)} swapped`);
    parts.push(`${count(snapshot.waiting)} queued`);
    const live = rows.filter((row) => row.state !== "finished").length;
    const hidden = snapshot.running + snapshot.loading + snapshot.swapped + snapshot.waiting - live;
    setText(this.census, parts.join(" · ") + (hidden > 0 ? ` · the first ${count(live)} are shown` : ""));
  }

  select(id) {
    this.selected = id;
    for (const shown of this.rows.values()) {
      shown.button.setAttribute("aria-pressed", String(shown.row.request === id));
    }
  }

  // One stop for the Tab key; arrows move within the list.

  ensureTabStop() {
    const buttons = [...this.rows.values()].map((shown) => shown.button);
    if (buttons.length && !buttons.some((button) => button.tabIndex === 0)) buttons[0].tabIndex = 0;
  }

  onFocus(target) {
    for (const shown of this.rows.values()) shown.button.tabIndex = shown.button === target ? 0 : -1;
  }

  onKey(event) {
    const item = document.activeElement.closest("li");
    const moves = {
      ArrowDown: () => item?.nextSibling, ArrowUp: () => item?.previousSibling,
      Home: () => this.list.firstChild, End: () => this.list.lastChild,
    };
    const target = moves[event.key]?.();
    if (!target) return;
    event.preventDefault();
    target.querySelector("button").focus();
  }
}

/** Blocks of one tier on a canvas: a cell for each, or for as many as one cell stands for. */

import { isStill, resolved } from "./theme.js";

export const KINDS = ["empty", "filling", "cached", "draining", "in_use"];
const VARIABLES = ["--track", "--filling", "--cached", "--draining", "--hue"];
const BUSY = 8;
const FADE_MS = 420;
const LARGEST = 36;
const MOST_OBLONG = 1.4;

export class Grid {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.cells = new Uint8Array();
    this.owners = null;
    this.lit = null; // cells of the selected request, or null
    this.byOwner = false;
    this.frame = 0;
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  /** Read the colours again: the theme may have changed. */
  recolor() {
    this.colors = VARIABLES.map((name) => resolved(this.canvas.parentElement, name));
    this.requestDraw();
  }

  /** New cells; those that differ fade over. */
  update(cells, owners, levels) {
    if (cells.length !== this.cells.length) {
      this.before = cells.slice();
      this.changed = new Float64Array(cells.length);
      this.cells = cells;
      this.resize();
    }
    const now = performance.now();
    for (let i = 0; i < cells.length; i += 1) {
      if (cells[i] !== this.cells[i]) {
        this.before[i] = this.cells[i];
        this.changed[i] = now;
      }
    }
    this.cells = cells;
    this.owners = owners;
    this.levels = levels;
    this.requestDraw();
  }

  /** Light these cells and dim the others; null for none. */
  light(cells) {
    this.lit = cells ? new Set(cells) : null;
    this.requestDraw();
  }

  paintByOwner(yes) {
    this.byOwner = yes;
    this.requestDraw();
  }

  /** The cell under a point of the canvas, or -1. */
  at(x, y) {
    const column = Math.floor(x / this.width);
    const row = Math.floor(y / this.height);
    const index = row * this.columns + column;
    return column < this.columns && index < this.cells.length ? index : -1;
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !this.cells.length) return;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    Object.assign(this, shape(this.cells.length, width, height));
    this.requestDraw();
  }

  requestDraw() {
    if (!this.frame) this.frame = requestAnimationFrame((now) => this.draw(now));
  }

  draw(now) {
    this.frame = 0;
    if (!this.colors || !this.columns) return;
    const context = this.context;
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    let isMoving = false;
    for (let i = 0; i < this.cells.length; i += 1) {
      const age = now - this.changed[i];
      const part = isStill() || age >= FADE_MS ? 1 : Math.max(0, age) / FADE_MS;
      isMoving ||= part < 1;
      if (part < 1) this.cell(i, this.before[i], 1);
      this.cell(i, this.cells[i], part);
    }
    context.globalAlpha = 1;
    if (isMoving) this.requestDraw();
  }

  cell(index, packed, part) {
    const context = this.context;
    const x = (index % this.columns) * this.width;
    const y = Math.floor(index / this.columns) * this.height;
    const [width, height] = [this.width - this.gap, this.height - this.gap];
    const kind = packed & 7;
    const dim = this.lit && !this.lit.has(index) ? 0.22 : 1;
    context.globalAlpha = part;
    context.fillStyle = this.colors[0];
    context.fillRect(x, y, width, height);
    if (!kind) return;
    const level = (packed >> 4) / this.levels;
    context.globalAlpha = part * dim * (0.3 + 0.7 * level);
    context.fillStyle = this.color(index, kind);
    context.fillRect(x, y, width, height);
    if (packed & BUSY && kind !== 1 && kind !== 3) this.spark(x + width / 2, y + height / 2, part * dim);
  }

  /** Something in this cell moves, though most of it does not. */
  spark(x, y, alpha) {
    const size = Math.max(2, Math.round(Math.min(this.width, this.height) * 0.4));
    this.context.globalAlpha = alpha;
    this.context.fillStyle = this.colors[1];
    this.context.fillRect(x - size / 2, y - size / 2, size, size);
  }

  color(index, kind) {
    const owner = this.byOwner && this.owners ? this.owners[index] : 0;
    return owner ? ownerColor(owner) : this.colors[kind];
  }
}

/** Columns, and whole pixels for each cell, that fill the most of a box with nearly square cells. */
export function shape(count, width, height) {
  let best = { columns: Math.max(1, Math.floor(width / 3)), width: 3, height: 3, gap: 0.5 };
  let most = 0;
  for (let columns = 1; columns <= Math.min(count, width / 3); columns += 1) {
    const wide = Math.min(LARGEST, Math.floor(width / columns));
    const tall = Math.min(LARGEST, Math.floor(height / Math.ceil(count / columns)));
    const covered = wide * tall;
    const isSquare = Math.max(wide, tall) <= Math.min(wide, tall) * MOST_OBLONG;
    if (tall >= 2 && isSquare && covered > most) {
      most = covered;
      best = { columns, width: wide, height: tall, gap: Math.min(wide, tall) >= 5 ? 1 : 0.5 };
    }
  }
  return best;
}

/** Neighbours in number get hues far apart. */
export function ownerColor(owner) {
  const hue = (owner * 137.508 + 20) % 360;
  return `oklch(0.68 0.13 ${hue.toFixed(1)})`;
}

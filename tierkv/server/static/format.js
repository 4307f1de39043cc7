/** Numbers as people read them. */

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** 12,345 */
export function count(value) {
  return whole.format(value);
}

/** Three digits at least, no more than are true: 4.2, 38.1, 412, 12,034. */
export function speed(value) {
  if (value == null) return "–";
  return value > 0 && value < 99.95 ? value.toFixed(1) : whole.format(value);
}

function scaled(value, base, units) {
  let step = 0;
  while (value >= base * 0.9995 && step < units.length - 1) {
    value /= base;
    step += 1;
  }
  const digits = step === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return [value.toFixed(digits), units[step]];
}

/** Sizes in binary units: ["1.50", "GiB"]. */
export function bytes(value) {
  return scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
}

/** Speeds in decimal units: ["1.24", "GB/s"]. */
export function bytesPerSecond(value) {
  return scaled(value, 1000, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"]);
}

/** 0.034 s, 1.2 s, 34 s, 3 min, 2 h. */
export function seconds(value) {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 9.95) return `${value.toFixed(value < 0.995 ? 2 : 1)} s`;
  if (value < 120) return `${value.toFixed(0)} s`;
  return value < 7200 ? `${Math.floor(value / 60)} min` : `${Math.floor(value / 3600)} h`;
}

/** A share as whole percents, never 100 for almost. */
export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 1) return "<1";
  return value < 100 ? String(Math.floor(value + 1e-9)) : "100";
}

/** The engine's id without the number that makes it unique. */
export function shortId(id) {
  const slash = id.lastIndexOf("/");
  return slash > 0 ? id.slice(0, slash) : id;
}

/** Make an element: `element("b", {className: "x"}, "text", child)`. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "data") Object.assign(made.dataset, value);
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Set a text only when it differs: screens and readers have less to do. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

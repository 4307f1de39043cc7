/** Puts the page together: the stream on one side, the parts that show it on the other. */

import { Charts } from "./charts.js";
import { count, element, setText } from "./format.js";
import { askForKey, currentKey } from "./key.js";
import { Links } from "./links.js";
import { readRows, Requests } from "./requests.js";
import { Stream } from "./stream.js";
import { startTheme } from "./theme.js";
import { Tiers, Tip } from "./tiers.js";
import { Detail } from "./timeline.js";

const at = (id) => document.getElementById(id);

const tiers = new Tiers(at("stage"), new Tip(at("tip")), (id) => id && select(id));
const links = new Links(at("stage"), at("links"), at("flows"));
const charts = new Charts(at("charts"), at("cursor-note"));
const requests = new Requests({ list: at("rows"), empty: at("no-rows"), census: at("census") }, select);
const detail = new Detail(
  {
    hint: at("detail-hint"), body: at("detail-body"), id: at("detail-id"), facts: at("detail-facts"),
    lanes: at("lanes"), axis: at("lane-axis"), phases: at("phases"),
  },
  (cells) => tiers.light(cells),
);

let hello = null;
let latest = null;
let isDrawn = true;

/** Select a request; the same one again deselects it. */
function select(id) {
  const next = id === requests.selected ? null : id;
  requests.select(next);
  detail.open(next);
}

function onEvent(event) {
  if (event.type === "hello") greet(event);
  else if (event.type === "snapshot") {
    latest = event;
    charts.add(event.sample);
    if (isDrawn) requestAnimationFrame(draw);
    isDrawn = false;
  }
}

function greet(event) {
  hello = event;
  const facts = [["b", event.model], ["span", `${event.dtype} on ${event.device}`],
    ["span", `blocks of ${event.block_size} tokens`], ["span", `v${event.version}`]];
  at("facts").replaceChildren(...facts.map(([name, text]) => element("span", {}, name === "b" ? element("b", {}, text) : text)));
  document.title = `${event.model} · tierkv`;
  tiers.greet(event);
  charts.greet(event);
}

/** One frame of what the last snapshot says. */
function draw() {
  isDrawn = true;
  const rows = readRows(latest, hello.row);
  const owners = new Map(rows.filter((row) => row.owner).map((row) => [row.owner, { id: row.request, label: row.label }]));
  tiers.update(latest, owners);
  links.update(latest);
  requests.update(rows, latest);
  tellSince(latest.counters);
}

function tellSince(counters) {
  const ended = counters.finished_stop + counters.finished_length + counters.finished_abort;
  const share = counters.queried_tokens ? counters.hit_tokens / counters.queried_tokens : 0;
  const facts = [
    [ended, ended === 1 ? "sequence ended" : "sequences ended"],
    [counters.generated_tokens, "tokens generated"],
    [`${Math.round(share * 100)} %`, "of prompt tokens found in cache"],
    [counters.preemptions, "preemptions"],
    [counters.swaps, "of them by swap"],
  ];
  const parts = facts.flatMap(([value, words], i) => [
    i ? " · " : "Since the start: ", element("b", {}, typeof value === "number" ? count(value) : value), ` ${words}`,
  ]);
  at("since").replaceChildren(...parts);
}

function onState(state, text) {
  at("status").dataset.state = state;
  at("main").dataset.state = state;
  setText(at("status-text"), text);
}

startTheme(at("theme"), () => {
  tiers.recolor();
  charts.recolor();
});
at("paint").addEventListener("change", (event) => tiers.paintByOwner(event.target.value === "owner"));
at("detail-close").addEventListener("click", () => select(requests.selected));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && requests.selected && !at("key").open) select(requests.selected);
});

new Stream("dashboard/events", { key: currentKey, needKey: askForKey, onEvent, onState }).run();

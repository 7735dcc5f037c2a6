// The load's controls, its dots, and the results of both arms.

import { readable, sample } from "../compare/picture.js";
import { axis, chart, colour } from "../parts/chart.js";
import { fill, h } from "../parts/dom.js";
import { kindAndPrecision, ms, percent, whole } from "../parts/format.js";
import { hue, ready, top1 } from "../parts/models.js";
import { complain } from "../parts/notice.js";
import { current, deadlineMs, number, update } from "../parts/state.js";
import { Load, MAX_RATE, SECONDS, armAt, summary } from "./load.js";

/** @import {Model, ModelList} from "../types.js" */
/** @import {Arm, Sample} from "./load.js" */
/** @import {Chart, Data} from "../parts/chart.js" */

const REDRAW_MS = 150;
/** More than the most accurate shipped model manages on two cores that the browser shares: then there is something to choose. */
const DEFAULT_RATE = 80;
const LATENCY = { min: 1, max: 5000 };

/** @type {Load | null} */
let load = null;
/** @type {Sample[]} */
let samples = [];
/** @type {Model[]} */
let members = [];
/** @type {Chart | null} */
let drawn = null;
let deadline = deadlineMs();
let family = "";
let fixed = "";
let drawnAt = 0;
let starting = false;

const button = h("button", { type: "button", class: "primary", id: "load-start", onclick: () => (load?.running ? stopLoad() : void start()) }, "Start");
const rate = h("input", { type: "number", id: "rate", min: 1, max: MAX_RATE, step: 1, onchange: () => update({ rate: wantedRate() }) });
rate.addEventListener("keydown", (event) => event.key === "Enter" && !load?.running && void start());
const select = h("select", { id: "fixed", onchange: () => update({ fixed: select.value }) });
const state = h("span", { class: "hint", role: "status" });
const dots = h("div", { class: "chart", role: "img", "aria-label": "Every answer as a dot: when it was due, and how long it took. The table has the totals." });
const legend = h("p", { class: "hint keys" });
const outcome = h("div", { id: "outcome" });

/** Put the panel in its place. @param {HTMLElement} place @param {ModelList} all @param {string} name of the family */
export async function installLoad(place, all, name) {
  const names = all.families[name] ?? [];
  const served = ready(all).filter((model) => names.includes(model.name));
  const same = name === family && served.map((model) => model.name).join() === members.map((model) => model.name).join();
  family = name;
  if (place.firstChild && same) return;
  stopLoad();
  members = served;
  rate.value = String(number("rate", { min: 1, max: MAX_RATE, otherwise: DEFAULT_RATE }));
  fill(select, ...members.map((model) => h("option", { value: model.name }, kindAndPrecision(model))));
  const named = current().values.get("fixed");
  select.value = (members.find((model) => model.name === named) ?? members[0])?.name ?? "";
  fill(place,
    h("p", { class: "hint" }, `The family and the fixed model take turns, one second each, with the deadline above. Pictures are due at a constant rate, whether or not earlier ones have been answered, and latency counts from then. A browser has few connections: a picture that none takes before its deadline counts as late.`),
    h("div", { class: "controls" },
      h("label", { for: "rate" }, "Send "), rate, h("span", {}, "images per second for ", `${SECONDS} s; the family `, h("code", {}, family)),
      h("label", { for: "fixed" }, " against "), select, button, state),
    dots, legend, outcome);
  samples = [];
  drawn?.destroy();
  drawn = null;
  await redraw();
}

/** End the load, if one is running. */
export function stopLoad() {
  load?.stop();
}

/** Draw the line of the deadline where it is now, unless it belongs to results. */
export function drawDeadline() {
  if (!samples.length) drawn?.redraw();
}

const wantedRate = () => Math.min(MAX_RATE, Math.max(1, Math.round(Number(rate.value) || 1)));

async function start() {
  if (starting) return;
  starting = true;
  const wanted = wantedRate();
  rate.value = String(wanted);
  update({ rate: wanted });
  try {
    const { file, name } = readable() ?? (await sample("raccoon"));
    // Meanwhile another tab may be shown.
    if (!button.checkVisibility()) return;
    samples = [];
    drawnAt = 0;
    deadline = deadlineMs();
    fixed = select.value;
    button.textContent = "Stop";
    load = new Load({
      picture: file,
      rate: wanted,
      deadlineMs: deadline,
      names: { family, fixed },
      onSample: (one) => {
        samples.push(one);
        if (performance.now() - drawnAt > REDRAW_MS) void redraw();
      },
      onEnd: (error) => {
        button.textContent = "Start";
        const how = error ? "stopped by an error" : document.hidden ? "stopped: the tab was hidden" : "ended";
        state.textContent = `${how} after ${(load?.seconds ?? 0).toFixed(0)} s: ${name}, ${wanted} per second, deadline ${ms(deadline)}`;
        if (error) complain(error);
        void redraw();
      },
    });
    state.textContent = `sending ${name} …`;
  } catch (error) {
    complain(error);
  } finally {
    starting = false;
  }
}

async function redraw() {
  drawnAt = performance.now();
  try {
    drawn ??= await makeChart();
    drawn.setData(data());
  } catch (error) {
    complain(error);
  }
  const used = new Set(samples.map((one) => one.model));
  fill(legend, ...members.filter((model) => used.has(model.name)).map((model) => h("span", { class: `key model m${hue(model)}` }, kindAndPrecision(model))),
    samples.some(isLost) && h("span", { class: "key refused" }, "refused, or no answer in time"),
    h("span", {}, "Shaded: the fixed model’s seconds. Dashed: the deadline."));
  fill(outcome, samples.length > 0 && table());
}

function table() {
  const seconds = load?.seconds ?? 0;
  const top1Of = (/** @type {string} */ name) => top1(members.find((model) => model.name === name));
  const hasFailed = samples.some((one) => one.outcome === "failed");
  const row = (/** @type {Arm} */ arm, /** @type {string} */ title) => {
    const sum = summary(samples, arm, seconds, top1Of);
    return h("tr", {}, h("th", { scope: "row" }, title),
      ...[whole(sum.sent), `${whole(sum.inTime)} (${percent(sum.sent ? sum.inTime / sum.sent : 0, 0)})`, whole(sum.late), whole(sum.refused), ...(hasFailed ? [whole(sum.failed)] : []), sum.goodput.toFixed(1), ms(sum.medianMs), sum.top1 === null ? "–" : percent(sum.top1)].map((value) => h("td", {}, value)));
  };
  const heads = ["due", "in time", "late", "refused", ...(hasFailed ? ["failed"] : []), "in time per s", "median", "mean test top-1"];
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Results of the load" },
    h("table", { class: "numbers" },
      h("thead", {}, h("tr", {}, h("td", {}), ...heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, row("family", `Family ${family}`), row("fixed", `Always ${kindAndPrecision(members.find((model) => model.name === (fixed || select.value)))}`))));
}

/** @param {Sample} one */
function isLost(one) {
  return one.model === null;
}

/** One series for each model, and one for what got no answer; in the order of due times. @returns {Data} */
function data() {
  const sorted = [...samples].sort((one, other) => one.dueS - other.dueS);
  const clamp = (/** @type {number} */ value) => Math.min(LATENCY.max, Math.max(LATENCY.min, value));
  return [
    sorted.map((one) => one.dueS),
    ...members.map((model) => sorted.map((one) => (one.model === model.name ? clamp(one.latencyMs) : null))),
    sorted.map((one) => (isLost(one) ? clamp(one.latencyMs) : null)),
  ];
}

function makeChart() {
  const series = [...members.map((model) => `--m${hue(model)}`), "--ink"].map((name) => ({
    paths: () => null,
    points: { show: true, size: 5, width: 0, fill: () => colour(name), stroke: () => colour(name) },
  }));
  return chart(dots, data(), (options) => ({
    ...options,
    series: [{}, ...series],
    scales: { x: { time: false, range: [0, SECONDS] }, y: { distr: 3, range: [LATENCY.min, LATENCY.max] } },
    axes: [axis({ size: 28, values: (_, ticks) => ticks.map((tick) => `${tick} s`) }), axis({ size: 58, values: (_, ticks) => ticks.map((tick) => (/^[125]/.test(String(tick)) ? ms(tick).replace(".0", "") : "")) })],
    hooks: { drawClear: [shade], draw: [line] },
  }), 240);
}

/** @param {Chart} plot */
function shade(plot) {
  const { ctx } = plot;
  ctx.save();
  ctx.fillStyle = colour("--field");
  for (let second = 0; second < SECONDS; second += 1) {
    if (armAt(second) !== "fixed") continue;
    const left = plot.valToPos(second, "x", true), right = plot.valToPos(second + 1, "x", true);
    ctx.fillRect(left, plot.bbox.top, right - left, plot.bbox.height);
  }
  ctx.restore();
}

/** @param {Chart} plot */
function line(plot) {
  const { ctx } = plot;
  const y = plot.valToPos(samples.length ? deadline : deadlineMs(), "y", true);
  ctx.save();
  ctx.strokeStyle = colour("--ink");
  ctx.setLineDash([6, 4]);
  ctx.beginPath();
  ctx.moveTo(plot.bbox.left, y);
  ctx.lineTo(plot.bbox.left + plot.bbox.width, y);
  ctx.stroke();
  ctx.restore();
}

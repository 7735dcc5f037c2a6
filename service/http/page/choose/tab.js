// Choose: a deadline, and which model answers within it.

import { getJson, isCancelled } from "../parts/api.js";
import { byId, fill, h } from "../parts/dom.js";
import { kindAndPrecision, ms, percent, points, signedMs } from "../parts/format.js";
import { choosingFamilies, hue, models, precisionOf } from "../parts/models.js";
import { complain, settle } from "../parts/notice.js";
import { DEADLINE, current, deadlineMs, update } from "../parts/state.js";
import { drawDeadline, installLoad, stopLoad } from "./load_panel.js";
import { becauseOf, title } from "./reasons.js";

/** @import {Model, Plan, Rung} from "../types.js" */

const AXIS = { min: 1, max: DEADLINE.max };
const TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000];
const REFRESH_MS = 1000;
const STEPS = 1000;

/** Where a time is on the axis, which is logarithmic. @param {number} value */
const at = (value) => Math.min(1, Math.max(0, Math.log(value / AXIS.min) / Math.log(AXIS.max / AXIS.min)));
/** @param {number} share of the slider's range */
const deadlineAt = (share) => {
  const exact = DEADLINE.min * (DEADLINE.max / DEADLINE.min) ** share;
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(exact)) - 1);
  return Math.round(exact / unit) * unit;
};
/** @param {number} deadline */
const shareOf = (deadline) => Math.log(deadline / DEADLINE.min) / Math.log(DEADLINE.max / DEADLINE.min);

let controller = new AbortController();
/** @type {ReturnType<typeof setInterval> | undefined} */
let refreshing;
let showing = false;
let failing = false;
/** @type {Map<string, Model>} */
let known = new Map();
/** @type {string[]} */
let families = [];

/** The tab's view. */
export function chooseTab() {
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stopLoad();
  });
  return { show, hide };
}

async function show() {
  showing = true;
  clearInterval(refreshing);
  try {
    const all = await models({ again: true });
    if (!showing) return;
    known = new Map(all.models.map((model) => [model.name, model]));
    families = choosingFamilies(all);
    byId("under-load").hidden = !families.length;
    if (!families.length) {
      return fill(byId("plan"), h("p", {}, "No family here has more than one model that serves, so there is nothing to choose."));
    }
    if (byId("plan").dataset.families !== families.join()) build();
    showDeadline();
    await installLoad(byId("load"), all, family());
    await plan();
    if (!showing) return;
    clearInterval(refreshing);
    refreshing = setInterval(() => {
      if (!document.hidden) void plan();
    }, REFRESH_MS);
  } catch (error) {
    complain(error, () => void show());
  }
}

function hide() {
  showing = false;
  clearInterval(refreshing);
  controller.abort();
  stopLoad();
}

function family() {
  const named = current().values.get("family");
  return families.find((name) => name === named) ?? families[0] ?? "";
}

function build() {
  const slider = h("input", { type: "range", id: "deadline", min: 0, max: STEPS, step: 1, "aria-label": "Deadline" });
  const value = h("output", { id: "deadline-value", for: "deadline" });
  slider.addEventListener("input", () => {
    update({ deadline: deadlineAt(Number(slider.value) / STEPS) });
    showDeadline();
    void plan();
  });
  const select = h("select", { id: "family", onchange: () => { update({ family: select.value }); void show(); } },
    ...families.map((name) => h("option", { value: name }, name)));
  select.value = family();
  byId("plan").dataset.families = families.join();
  fill(byId("plan"),
    families.length > 1 && h("p", {}, h("label", { for: "family" }, "Family "), select),
    h("p", { id: "chosen", class: "chosen-line", role: "status" }),
    h("div", { id: "ladder", class: "ladder", role: "table", "aria-label": "The models of the family, the most accurate first" },
      h("div", { class: "rung head", role: "row" },
        h("span", { role: "columnheader", class: "who" }, "Model", h("small", { class: "top1" }, "test top-1")),
        h("span", { role: "columnheader", class: "bar" },
          h("span", { class: "asked" }, h("label", { for: "deadline" }, "Answer within "), value),
          h("span", { class: "slider" }, slider),
          h("span", { class: "ticks" }, ...TICKS.map((tick) => h("span", { "--at": at(tick) }, tick < 1000 ? tick : `${tick / 1000}\u00a0s`)))),
        h("span", { role: "columnheader", class: "why" }, "Why", h("small", {}, "top-1 and time against the chosen"))),
      h("div", { id: "rungs", role: "rowgroup" })),
    h("p", { class: "hint keys" }, h("span", { class: "key inference" }, "decoding and computing"), h("span", { class: "key queue" }, "waiting: other requests, or busy processors"),
      h("span", { class: "key deadline" }, "deadline"), h("span", { class: "key allowed" }, "in time up to here"),
      "Predicted for a small picture sent now; logarithmic scale."));
}

/** Put the deadline of the address into slider and ladder. */
function showDeadline() {
  const slider = /** @type {HTMLInputElement} */ (byId("deadline"));
  if (deadlineAt(Number(slider.value) / STEPS) !== deadlineMs()) slider.value = String(Math.round(STEPS * shareOf(deadlineMs())));
  slider.setAttribute("aria-valuetext", ms(deadlineMs()));
  byId("deadline-value").textContent = ms(deadlineMs());
  byId("ladder").style.setProperty("--deadline", String(at(deadlineMs())));
  drawDeadline();
}

async function plan() {
  controller.abort();
  controller = new AbortController();
  try {
    /** @type {Plan} */
    const answer = await getJson(`v1/families/${encodeURIComponent(family())}/plan?deadline_ms=${deadlineMs()}`, controller.signal);
    if (!showing) return;
    if (failing) settle();
    failing = false;
    draw(answer);
  } catch (error) {
    if (isCancelled(error) || !showing) return;
    // Reported once; the next second tries again.
    if (!failing) complain(error);
    failing = true;
  }
}

/** @param {Plan} answer */
function draw(answer) {
  const chosen = answer.rungs.find((rung) => rung.chosen);
  const name = chosen ? kindAndPrecision(known.get(chosen.model)) : answer.chosen;
  const text = `${ms(answer.deadline_ms)}: ${title(answer)} ${name}, ${becauseOf(answer)}`;
  const line = byId("chosen");
  // Screen readers read out each update: not every second, but only when the text has changed.
  if (line.dataset.text !== text) {
    line.dataset.text = text;
    const within = ["Within ", h("strong", {}, ms(answer.deadline_ms)), " the family ", h("code", {}, answer.family)];
    if (answer.in_time) fill(line, ...within, " answers with ", h("strong", {}, name), `: ${becauseOf(answer)}.`);
    else fill(line, ...within, " refuses at once: no model is predicted to meet the deadline. The closest is ", h("strong", {}, name), ".");
  }
  byId("ladder").style.setProperty("--allowed", String(at(answer.allowed_ms)));
  fill(byId("rungs"), ...answer.rungs.map((rung) => rungRow(rung, chosen, answer)));
}

/** @param {Rung} rung @param {Rung | undefined} chosen @param {Plan} plan */
function rungRow(rung, chosen, plan) {
  const model = known.get(rung.model), called = title(plan);
  const why = {
    chosen: called,
    late: `too late: over ${ms(plan.allowed_ms)}`,
    headroom: "in time, but with too little headroom",
    less_accurate: "in time, but less accurate",
    no_faster: `${rung.in_time ? "" : "too late, and "}as costly as a more accurate one`,
  }[rung.why];
  const cost = chosen && !rung.chosen ? `${points(rung.top1 - chosen.top1)}, ${signedMs(rung.predicted_ms - chosen.predicted_ms)}` : null;
  const took = `${ms(rung.compute_ms)} to decode and compute, ${ms(rung.queue_ms)} to wait`;
  return h("div", { class: `rung ${rung.chosen ? "chosen" : rung.in_time ? "" : "late"}${rung.why === "late" ? " wrong" : ""}`, role: "row", "data-model": rung.model },
    h("span", { role: "rowheader", class: "who" }, h("span", { class: `dot m${hue(model)}${precisionOf(model ?? { name: rung.model, version: 0, state: "" }) === "fp32" ? "" : " hollow"}` }),
      h("span", { class: "kind" }, kindAndPrecision(model)), h("span", { class: "top1" }, percent(rung.top1))),
    h("span", { role: "cell", class: "bar", title: took },
      h("span", { class: "allowed" }),
      h("span", { class: "part inference", "--share": at(rung.compute_ms) }),
      h("span", { class: "part queue", "--share": at(rung.predicted_ms) - at(rung.compute_ms) }),
      h("span", { class: "finish" }, ms(rung.predicted_ms))),
    h("span", { role: "cell", class: "why" }, rung.chosen ? h("span", { class: "badge" }, called) : why, cost && h("small", {}, cost)));
}

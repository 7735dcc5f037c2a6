// Live: what the service is doing, once a second, five minutes back. Nothing is requested while the page is hidden.

import { getJson, isCancelled } from "../parts/api.js";
import { byId, fill, h } from "../parts/dom.js";
import { counted, duration, kindAndPrecision, megabytes, ms, percent, whole } from "../parts/format.js";
import { hue, models, precisionOf } from "../parts/models.js";
import { complain, settle } from "../parts/notice.js";
import { History } from "./history.js";
import { onTrial } from "./rollouts.js";

/** @import {Model, ModelStatus, Status} from "../types.js" */

const EVERY_MS = 1000;
/** With fewer answers the highest percentiles say nothing. */
const ENOUGH_ANSWERS = 20;

/** @type {ReturnType<typeof setTimeout> | undefined} */
let timer;
let controller = new AbortController();
let showing = false;
let failing = false;
/** @type {History | null} */
let history = null;
/** @type {Map<string, Model>} */
let known = new Map();

/** The tab's view. */
export function liveTab() {
  document.addEventListener("visibilitychange", () => {
    if (!showing) return;
    if (document.hidden) pause();
    else void poll();
  });
  return { show, hide };
}

async function show() {
  showing = true;
  if (!history) {
    const charts = ["rate", "latency", "waiting"].map((name) => h("div", { class: "chart", id: `chart-${name}` }));
    fill(byId("live-content"),
      h("div", { id: "tiles", class: "tiles" }),
      h("div", { class: "charts" },
        figure("Images per second", "by model, mean of about ten seconds", charts[0]),
        figure("Latency, 95th percentile", "19 of 20 answers were faster", charts[1]),
        figure("Waiting", "images in all queues", charts[2])),
      h("div", { id: "live-models" }),
      h("div", { id: "live-rollouts" }),
      h("div", { class: "two" }, h("div", { id: "refusals" }), h("div", { id: "choices" })));
    history = new History(/** @type {HTMLElement[]} */ (charts));
  }
  try {
    known = new Map((await models({ again: true })).models.map((model) => [model.name, model]));
  } catch (error) {
    return complain(error, () => void show());
  }
  await poll();
}

function hide() {
  showing = false;
  pause();
}

function pause() {
  clearTimeout(timer);
  controller.abort();
}

async function poll() {
  pause();
  controller = new AbortController();
  const { signal } = controller;
  try {
    /** @type {Status} */
    const status = await getJson("v1/status", signal);
    if (failing) settle();
    failing = false;
    draw(status);
    await history?.add(status, known);
  } catch (error) {
    if (isCancelled(error)) return;
    // Reported once; the next second tries again.
    if (!failing) complain(error);
    failing = true;
    history?.gap();
  }
  if (showing && !document.hidden && !signal.aborted) timer = setTimeout(() => void poll(), EVERY_MS);
}

/** @param {Status} status */
function draw(status) {
  const refused = Object.values(status.refusals).reduce((sum, count) => sum + count, 0);
  fill(byId("tiles"),
    tile("images per second", status.images_per_s.toFixed(1)),
    tile("images waiting", whole(status.queue.waiting), `at most ${whole(status.queue.limit)}`),
    tile("to finish all work", ms(status.drain_s === null ? null : 1000 * status.drain_s), "predicted"),
    tile("refused", whole(refused), "since the start"),
    tile("memory", megabytes(status.memory_mb)),
    tile("ready", status.ready ? "yes" : "no", `on ${status.device}, ${counted(status.lanes, "lane")} × ${counted(status.threads, "thread")}`),
    tile("uptime", duration(status.uptime_s)));
  fill(byId("live-models"), table(status));
  fill(byId("live-rollouts"), ...onTrial(status.rollouts ?? []));
  fill(byId("refusals"), h("h3", {}, "Refused, by reason"), refusals(status));
  fill(byId("choices"), h("h3", {}, "Chosen, by family"), ...choices(status));
}

/** @param {string} name @param {string} value @param {string} [more] */
function tile(name, value, more) {
  return h("div", { class: "tile" }, h("strong", {}, value), h("span", {}, name), more && h("small", {}, more));
}

/** @param {string} title @param {string} hint @param {HTMLElement | undefined} content */
function figure(title, hint, content) {
  return h("figure", { class: "card" }, h("figcaption", {}, h("strong", {}, title), h("span", { class: "hint" }, hint)), content);
}

/** @param {Status} status */
function table(status) {
  const serving = status.models.filter((model) => model.state === "ready"), out = status.models.filter((model) => model.state !== "ready");
  const heads = ["answered", "per second", "p50", "p95", "p99", "waiting", "memory"];
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Models" },
    h("table", { class: "numbers" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Model"), ...heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, ...serving.map((model) => modelRow(model, status.window_s)))),
    h("p", { class: "hint" }, `Percentiles of the last ${status.window_s.toFixed(0)} s, interpolated between the buckets of /metrics; p95 and p99 from ${ENOUGH_ANSWERS} answers on.`),
    out.length > 0 && h("p", { class: "hint" }, `${counted(out.length, "model")} not serving: `, out.map((model) => `${model.name} (${model.state})`).join(", "), "."),
    status.models_left_out ? h("p", { class: "hint" }, `${counted(status.models_left_out, "model")} with less work are not shown.`) : null);
}

/** @param {ModelStatus} model @param {number} seconds of its rates and percentiles */
function modelRow(model, seconds) {
  const about = known.get(model.name);
  const isEnough = model.images_per_s * seconds >= ENOUGH_ANSWERS - 0.5;
  const hollow = precisionOf(about ?? model) === "fp32" ? "" : " hollow";
  const values = [whole(model.images), model.images_per_s.toFixed(1), ms(model.p50_ms), ...[model.p95_ms, model.p99_ms].map((value) => ms(isEnough ? value : null)), whole(model.waiting), megabytes(model.memory_mb)];
  return h("tr", {},
    h("th", { scope: "row" }, h("span", { class: `dot m${hue(about)}${hollow}` }), " ", about?.variant ? kindAndPrecision(about) : h("code", {}, model.name)),
    ...values.map((value) => h("td", {}, value)));
}

/** @type {Record<string, string>} */
const REASONS = {
  lag: "event loop lag",
  "deadline-exceeded": "deadline expired in the queue",
  "not-ready": "not ready",
  images: "image limit reached",
  bytes: "byte limit reached",
  deadline: "deadline could not be met",
  "client-disconnected": "client hung up",
  "key-rate": "key over its request rate",
  "key-concurrency": "key over its concurrency",
};

/** @param {Status} status */
function refusals(status) {
  const entries = Object.entries(status.refusals).filter(([, count]) => count > 0);
  if (!entries.length) return h("p", { class: "hint" }, "None since the start.");
  return h("table", { class: "facts" }, h("tbody", {}, ...entries.sort((one, other) => other[1] - one[1]).map(([reason, count]) =>
    h("tr", {}, h("th", { scope: "row" }, REASONS[reason] ?? reason), h("td", {}, whole(count))))));
}

/** @param {Status} status */
function choices(status) {
  const families = Object.entries(status.choices).map(([name, counts]) => ({ name, counts: Object.entries(counts).filter(([, count]) => count > 0) })).filter(({ counts }) => counts.length);
  if (!families.length) return [h("p", { class: "hint" }, "No request to a family yet.")];
  return families.flatMap(({ name, counts }) => {
    const all = counts.reduce((sum, [, count]) => sum + count, 0);
    const sorted = counts.sort((one, other) => other[1] - one[1]);
    return [
      h("p", { class: "hint" }, h("code", {}, name), `, ${counted(all, "request")} since the start`),
      h("div", { class: "shares", role: "img", "aria-label": sorted.map(([model, count]) => `${model} ${percent(count / all, 0)}`).join(", ") },
        ...sorted.map(([model, count]) => h("span", { class: `part m${hue(known.get(model))}`, "--share": count / all }))),
      h("ul", { class: "keys" }, ...sorted.map(([model, count]) =>
        h("li", {}, h("span", { class: `dot m${hue(known.get(model))}` }), ` ${kindAndPrecision(known.get(model))}: ${percent(count / all, 0)}`))),
    ];
  });
}

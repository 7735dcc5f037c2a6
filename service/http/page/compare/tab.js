// Compare: one picture, every model.

import { getJson, isCancelled } from "../parts/api.js";
import { byId, fill, h } from "../parts/dom.js";
import { counted, kindAndPrecision, label, ms, percent } from "../parts/format.js";
import { choosingFamilies, groups, models, newest, top1 } from "../parts/models.js";
import { announce, complain, settle } from "../parts/notice.js";
import { current, deadlineMs, href, update } from "../parts/state.js";
import { becauseOf, title } from "../choose/reasons.js";
import { SAMPLES, choose, fromCamera, listen, onPicture, picture, remember, sample } from "./picture.js";
import { Row, emptyTable, groupBody, showMemory } from "./rows.js";
import { cancel, compare } from "./run.js";
import { copyButtons } from "./snippets.js";
import { roundScale, stageKeys } from "./stages.js";

/** @import {EndEvent, Plan} from "../types.js" */
/** @import {Picture} from "./picture.js" */

/** @type {Row[]} */
let rows = [];
/** The models that the rows are of: names, versions and states. */
let listed = "";
/** @type {string | null} */
let family = null;
/** @type {Plan | null} */
let plan = null;
const SETTLING_MS = 1500;
/** How often to ask whether a service that refuses still does. */
const SETTLING_TRIES = 3;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let settled;
let startedAt = 0;
let firstMs = 0;
/** Counts what was asked for: what is ready later than something newer is dropped. */
let latest = 0;

/** Build the tab; once, at start. */
export function installCompare() {
  const file = /** @type {HTMLInputElement} */ (byId("file"));
  file.addEventListener("change", () => {
    const chosen = file.files?.[0];
    if (chosen) void run({ file: chosen, name: chosen.name, sample: null });
    // The same file may be chosen again.
    file.value = "";
  });
  const camera = /** @type {HTMLButtonElement} */ (byId("camera"));
  camera.addEventListener("click", async () => {
    camera.disabled = true;
    try {
      const shot = await fromCamera();
      if (shot) void run(shot);
    } catch (error) {
      complain(error);
    } finally {
      camera.disabled = false;
    }
  });
  fill(byId("samples"), ...SAMPLES.map(({ name, title }) =>
    h("button", { type: "button", class: "sample", "data-sample": name, "aria-label": `Use the sample: ${title}`, onclick: () => runSample(name) },
      h("img", { src: `page/samples/${name}.jpg`, alt: "", width: 64, height: 64 }))));
  listen((dropped) => void run(dropped), complain);
  byId("copy").append(copyButtons(picture, onPicture));
}

/** Show the models, and the sample that the address names. */
export async function showCompare() {
  await list();
  const named = current().values.get("sample");
  await choice();
  if (plan && !plan.in_time) askWhenSettled();
  if (named && SAMPLES.some(({ name }) => name === named) && picture()?.sample !== named) await runSample(named);
}

/** Another tab is shown: answers still come in, and nothing more is asked for. */
export function hideCompare() {
  clearTimeout(settled);
}

async function list() {
  try {
    const all = await models();
    const now = newest(all).map(({ name, version, state }) => `${name} ${version} ${state}`).join();
    // Answers stay as long as the models are the same.
    if (rows.length && now === listed) return;
    listed = now;
    family = choosingFamilies(all)[0] ?? null;
    const bodies = groups(newest(all)).map(groupBody);
    rows = bodies.flatMap((body) => body.rows);
    byId("about-int8").hidden = !rows.some((row) => row.model.precision === "int8");
    const table = emptyTable();
    table.append(...bodies.map(({ body }) => body));
    fill(byId("table"), table, h("p", { class: "hint keys" }, "Time here: ", ...stageKeys()),
      h("p", { class: "hint" }, "To compare models, use the time alone: of one request on an idle service. Here all run at once, and wait for each other."));
    void memory();
  } catch (error) {
    complain(error, () => void showCompare());
  }
}

/** @param {string} name */
async function runSample(name) {
  latest += 1;
  const mine = latest;
  try {
    const read = await sample(name);
    if (mine === latest) await run(read);
  } catch (error) {
    if (mine === latest) complain(error, () => void runSample(name));
  }
}

/** Send a picture to all models. @param {Picture} chosen */
async function run(chosen) {
  latest += 1;
  startedAt = performance.now();
  firstMs = 0;
  cancel();
  settle();
  choose(chosen);
  update({ sample: chosen.sample });
  if (!rows.length) await list();
  for (const row of rows) row.clear(true);
  fill(byId("seen"), h("span", { class: "hint" }, "sending …"));
  fill(byId("verdict"), h("p", { class: "hint" }, `Asking ${counted(rows.filter((row) => row.ready).length, "model")} …`));
  fill(byId("timing"));
  try {
    const done = await compare(chosen.file, {
      picture: (event) => {
        const image = { url: `data:image/png;base64,${event.png}`, width: event.width, height: event.height };
        remember(event.models, image);
        show(image, chosen.name);
      },
      answer: (event) => {
        const row = rows.find((known) => known.model.name === event.model);
        row?.show(event);
        firstMs ||= performance.now() - startedAt;
        scale();
      },
      error: (event) => rows.find((known) => known.model.name === event.model)?.fail(event),
      end: (event) => finish(event),
    });
    if (done) void memory();
  } catch (error) {
    if (isCancelled(error)) return;
    for (const row of rows) if (!row.answer) row.clear(false);
    fill(byId("verdict"));
    if (!rows.some((row) => row.answer)) {
      fill(byId("seen"), h("span", { class: "hint" }, "no picture"));
      fill(byId("seen-caption"), chosen.name);
    }
    complain(error, () => void run(chosen));
  }
}

/** @param {{url: string, width: number, height: number}} image @param {string} name */
function show({ url, width, height }, name) {
  const img = h("img", { src: url, alt: `${name}, as the models see it`, width, height, class: width < 160 ? "pixelated" : "" });
  fill(byId("seen"), img);
  fill(byId("seen-caption"), `As the models see it: ${width} × ${height}`);
}

/** @param {EndEvent} end */
function finish(end) {
  const lastMs = performance.now() - startedAt;
  const answered = rows.filter((row) => row.answer);
  for (const row of rows) row.end();
  const reference = rows.find((row) => row.model.name === end.agreement?.model) ?? answered[0];
  if (reference && answered.length > 1) for (const row of answered) row.agree(reference);
  fill(byId("timing"), `Measured in this browser: first answer after ${ms(firstMs)}, ${counted(answered.length, "answer")} after ${ms(lastMs)}.`);
  Object.assign(byId("timing").dataset, { firstMs: firstMs.toFixed(1), lastMs: lastMs.toFixed(1) });
  const best = reference?.answer?.predictions[0];
  if (!best || !reference) return fill(byId("verdict"), h("p", { class: "answer" }, "No model answered."));
  const agree = answered.filter((row) => row.answer?.predictions[0]?.index === best.index).length - 1;
  const asked = answered.length - 1;
  const others = agree === asked ? (asked ? `all ${asked + 1} models agree` : "") :
    `says ${kindAndPrecision(reference.model)}, the most accurate; ${agree || "none"} of ${asked} others ${agree === 1 ? "agrees" : "agree"}`;
  fill(byId("verdict"), h("p", { class: "answer" }, h("strong", {}, label(best.label)), h("span", {}, others)), choiceLine());
  announce(`${label(best.label)}; ${others}`);
  askWhenSettled();
}

/** Ask for the choice once the load of this page's own requests has passed. */
function askWhenSettled(tries = SETTLING_TRIES) {
  clearTimeout(settled);
  if (byId("compare").hidden) return;
  settled = setTimeout(async () => {
    await choice();
    if (plan && !plan.in_time && tries > 1) askWhenSettled(tries - 1);
  }, SETTLING_MS);
}

/** Ask which model the family would choose, and mark it. */
export async function choice() {
  if (!family) return;
  try {
    plan = await getJson(`v1/families/${encodeURIComponent(family)}/plan?deadline_ms=${deadlineMs()}`);
  } catch (error) {
    // The table says enough without it.
    plan = null;
    if (!picture()) complain(error);
  }
  const rungs = new Map(plan?.rungs.map((rung) => [rung.model, rung]));
  for (const row of rows) {
    row.choose(row.model.name === plan?.chosen && plan ? title(plan) : null);
    row.alone(rungs.get(row.model.name), rungs.get(plan?.chosen ?? ""));
  }
  scale();
  const line = byId("verdict").querySelector(".choice");
  if (line) line.replaceWith(choiceLine());
  else byId("verdict").append(choiceLine());
}

function choiceLine() {
  const chosen = rows.find((row) => row.model.name === plan?.chosen);
  if (!plan || !chosen) return h("p", { class: "choice" });
  const rung = plan.rungs.find((other) => other.chosen);
  const asked = ["With a deadline of ", h("a", { href: href("choose") }, ms(plan.deadline_ms)), ", the family ", h("code", {}, plan.family)];
  const name = h("strong", {}, kindAndPrecision(chosen.model));
  return plan.in_time
    ? h("p", { class: "choice" }, ...asked, " chooses ", name, `: ${becauseOf(plan)} (predicted ${ms(rung?.predicted_ms)} now, `,
      `test top-1 ${percent(top1(chosen.model))}).`)
    : h("p", { class: "choice" }, ...asked, " refuses at once: no model is predicted to meet it. The closest is ", name,
      ` (predicted ${ms(rung?.predicted_ms)}).`);
}

/** Show the times of all rows on one scale, and differences from the chosen model. */
function scale() {
  const totals = rows.flatMap((row) => (row.answer ? [row.answer.timings_ms.total] : []));
  const scaleMs = roundScale(totals);
  const chosen = rows.find((row) => !row.badge.hidden);
  if (totals.length) fill(byId("scale"), `bars: 0 to ${ms(scaleMs)}`);
  for (const row of rows) {
    row.time(scaleMs);
    row.accuracy(chosen ? top1(chosen.model) : null);
  }
}

async function memory() {
  try {
    /** @type {import("../types.js").Status} */
    const status = await getJson("v1/status");
    const known = new Map(status.models.map((model) => [model.name, model.memory_mb]));
    for (const row of rows) showMemory(row, known.get(row.model.name));
  } catch (error) {
    // A column of dashes says so.
    console.info("no memory figures", error);
  }
}

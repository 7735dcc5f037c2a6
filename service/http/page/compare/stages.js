// Where the time of an answer went.

import { h } from "../parts/dom.js";
import { ms } from "../parts/format.js";

/** @import {Timings} from "../types.js" */

export const STAGES = /** @type {const} */ ([
  { name: "read", title: "read", hint: "receiving the picture" },
  { name: "decode", title: "decode", hint: "from JPEG, PNG … to pixels, and resizing" },
  { name: "inference", title: "compute", hint: "the model itself" },
  { name: "queue", title: "wait", hint: "until the engine is free: here mostly for the other models" },
  { name: "rest", title: "other", hint: "between the stages, and writing the answer" },
]);

/** How long each stage took; the rest is what the others leave of the total. @param {Timings} timings */
function durations(timings) {
  const { total, ...stages } = timings;
  const sum = stages.read + stages.decode + stages.queue + stages.inference;
  return { ...stages, rest: Math.max(0, total - sum) };
}

/** A bar of all stages; its full width is `scaleMs`. @param {Timings} timings @param {number} scaleMs */
export function stageBar(timings, scaleMs) {
  const took = durations(timings);
  const texts = STAGES.map((stage) => `${stage.title} ${ms(took[stage.name])}`);
  return h(
    "span",
    { class: "stages", role: "img", "aria-label": texts.join(", "), title: texts.join(", ") },
    ...STAGES.map((stage) => h("span", { class: `part ${stage.name}`, "--share": took[stage.name] / scaleMs })),
  );
}

/** What the colours mean. */
export function stageKeys() {
  return STAGES.map((stage) => h("span", { class: `key ${stage.name}`, title: stage.hint }, stage.title));
}

/** A round number that all of `values` fit under. @param {number[]} values */
export function roundScale(values) {
  const most = Math.max(1, ...values);
  const step = 10 ** Math.floor(Math.log10(most));
  return Math.ceil(most / (step / 2)) * (step / 2);
}

// One row per model; other precisions are folded under the model they were made from.

import { h, fill } from "../parts/dom.js";
import { kind, label, megabytes, millions, ms, percent, points, signedMs } from "../parts/format.js";
import { hue, precisionOf, top1 } from "../parts/models.js";
import { stageBar } from "./stages.js";

/** @import {AnswerEvent, ErrorEvent, Model, Prediction, Rung} from "../types.js" */
/** @import {Group} from "../parts/models.js" */

const COLUMNS = 7;

/** The row of one model, and a second one with its five best answers. */
export class Row {
  /** @param {Model} model @param {string} described @param {Model} [base] that it is folded under */
  constructor(model, described, base = model) {
    const isFolded = base !== model;
    this.model = model;
    /** The number of its colour, which all precisions share. */
    this.hue = hue(base);
    /** @type {AnswerEvent | null} */
    this.answer = null;
    this.badge = h("span", { class: "badge", hidden: true }, "chosen");
    this.fold = h("span", { class: "fold" });
    this.answerCell = cell("answer", "Answer");
    this.aloneCell = cell("figure", "Time alone");
    this.timeCell = cell("time", "Time here");
    this.memory = h("small", {});
    this.top1Cell = cell("figure", "Test top-1");
    this.element = h(
      "tr",
      { role: "row", "data-model": model.name },
      h("th", { role: "rowheader", scope: "row", class: "model" },
        h("span", { class: `dot m${this.hue}${isFolded ? " hollow" : ""}` }),
        h("span", { class: "names" }, h("span", { class: "kind" }, described), h("span", {}, h("code", {}, model.name), " ", this.badge), this.fold)),
      this.answerCell,
      this.aloneCell,
      this.timeCell,
      cell("figure", "K/V tokens", model.kv_tokens ? [String(model.kv_tokens), h("small", {}, `of ${model.tokens}`)] : "–"),
      cell("figure", "Parameters", millions(model.params), this.memory),
      this.top1Cell,
    );
    this.more = h("td", { role: "cell", colspan: COLUMNS, id: `top5-${model.name}` });
    this.moreElement = h("tr", { role: "row", class: "more", hidden: true }, this.more);
    this.accuracy(null);
    this.clear(false);
  }

  get ready() {
    return this.model.state === "ready";
  }

  /** Show that nothing is known about this picture yet. @param {boolean} pending whether an answer is on its way */
  clear(pending) {
    this.answer = null;
    this.moreElement.hidden = true;
    if (this.ready) fill(this.answerCell, pending && h("span", { class: "pending" }, "waiting …"));
    else fill(this.answerCell, h("details", { class: "hint" }, h("summary", {}, this.model.state), this.model.reason));
    fill(this.timeCell);
    this.element.classList.remove("differs", "failed");
  }

  /** @param {AnswerEvent} answer */
  show(answer) {
    this.answer = answer;
    const best = answer.predictions[0];
    if (!best) return;
    const button = h("button", { type: "button", class: "top", "aria-expanded": "false", "aria-controls": this.more.id },
      h("span", { class: "label" }, label(best.label)), h("span", { class: "probability" }, percent(best.probability, 0)));
    button.addEventListener("click", () => {
      this.moreElement.hidden = !this.moreElement.hidden;
      button.setAttribute("aria-expanded", String(!this.moreElement.hidden));
    });
    fill(this.answerCell, button, h("span", { class: "track" }, h("span", { class: `part m${this.hue}`, "--share": best.probability })));
    fill(this.more, topFive(answer.predictions, this.hue));
  }

  /** There will be no more events: what has none is not asked any more. */
  end() {
    const isPending = this.answerCell.querySelector(".pending") !== null;
    if (isPending) fill(this.answerCell, h("span", { class: "hint" }, "not asked: it no longer serves"));
  }

  /** @param {ErrorEvent} event */
  fail({ problem }) {
    this.element.classList.add("failed");
    const wait = problem.retry_after_ms ? ` Again in ${Math.ceil(problem.retry_after_ms / 1000)} s.` : "";
    fill(this.answerCell, h("span", { class: "error" }, `${problem.detail}.${wait}`));
  }

  /** Show whether it says the same as the most accurate model that answered. @param {Row} reference */
  agree(reference) {
    const own = this.answer?.predictions[0], other = reference.answer?.predictions[0];
    if (!own || !other) return;
    const same = own.index === other.index;
    this.element.classList.toggle("differs", !same);
    this.answerCell.querySelector(".agreement")?.remove();
    const text = this === reference ? "highest test top-1" : same ? "agrees" : "differs";
    this.answerCell.append(h("span", { class: "agreement" }, text));
  }

  /** Show the stages of its time, on the scale of all rows. @param {number} scaleMs */
  time(scaleMs) {
    if (!this.answer) return;
    const { total } = this.answer.timings_ms;
    fill(this.timeCell, h("div", { class: "timed" }, stageBar(this.answer.timings_ms, scaleMs), h("span", { class: "total" }, ms(total))));
  }

  /** Show what it would take without other requests, and the difference from the chosen model. @param {Rung | undefined} own @param {Rung | undefined} chosen */
  alone(own, chosen) {
    fill(this.aloneCell, ms(own?.compute_ms), own && chosen && own !== chosen && h("small", {}, signedMs(own.compute_ms - chosen.compute_ms)));
  }

  /** Show the measured top-1, and its difference from the chosen model's. @param {number | null} chosenTop1 */
  accuracy(chosenTop1) {
    const own = top1(this.model);
    if (own < 0) return fill(this.top1Cell, "–");
    const delta = chosenTop1 === null || !this.badge.hidden ? null : points(own - chosenTop1);
    fill(this.top1Cell, percent(own), delta && h("small", {}, delta));
  }

  /** Mark it as what the family would choose. @param {string | null} called */
  choose(called) {
    this.badge.textContent = called ?? "";
    this.badge.hidden = called === null;
    this.element.classList.toggle("chosen", called !== null);
  }
}

/** A body of the table: a model's row, and those folded under it. @param {Group} group @returns {{body: HTMLElement, rows: Row[]}} */
export function groupBody({ base, others }) {
  const first = new Row(base, kind(base));
  const folded = others.map((model) => new Row(model, `in ${precisionOf(model)}`, base));
  const body = h("tbody", { role: "rowgroup" }, first.element, first.moreElement);
  for (const row of folded) {
    row.element.classList.add("folded");
    row.element.hidden = true;
    body.append(row.element, row.moreElement);
  }
  if (folded.length) {
    const names = folded.map((row) => precisionOf(row.model)).join(", ");
    const state = folded.some((row) => row.ready) ? "" : ` (${folded[0]?.model.state})`;
    const button = h("button", { type: "button", class: "unfold", "aria-expanded": "false" }, names, state);
    button.setAttribute("aria-label", `${names} of ${base.name}`);
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      for (const row of folded) {
        row.element.hidden = !open;
        row.moreElement.hidden ||= !open;
      }
    });
    first.fold.append(button);
  }
  return { body, rows: [first, ...folded] };
}

/** The table without rows. */
export function emptyTable() {
  const head = (/** @type {string} */ name, /** @type {import("../parts/dom.js").Child[]} */ ...more) =>
    h("th", { role: "columnheader", scope: "col", class: name }, ...more);
  return h(
    "table",
    { role: "table", class: "models", "aria-label": "Models and their answers" },
    h("thead", { role: "rowgroup" },
      h("tr", { role: "row" },
        head("model", "Model"),
        head("answer", "Answer", h("small", {}, "with its confidence")),
        head("figure", "Time alone", h("small", {}, "predicted")),
        head("time", "Time here", h("small", { id: "scale" }, "all at once")),
        head("figure", "K/V tokens", h("small", {}, "of all patches")),
        head("figure", "Parameters", h("small", {}, "and memory")),
        head("figure", "Test top-1", h("small", {}, "measured")))),
  );
}

/** @param {string} name @param {string} title @param {...(import("../parts/dom.js").Child | import("../parts/dom.js").Child[])} children */
function cell(name, title, ...children) {
  return h("td", { role: "cell", class: name, "data-title": title }, ...children.flat());
}

/** @param {Prediction[]} predictions @param {number} colour */
function topFive(predictions, colour) {
  return h("ol", { class: "top5" }, ...predictions.map((prediction) =>
    h("li", {}, h("span", {}, label(prediction.label)), h("span", { class: "probability" }, percent(prediction.probability)),
      h("span", { class: "track" }, h("span", { class: `part m${colour}`, "--share": prediction.probability })))));
}

/** @param {Row} row @param {number | null | undefined} value */
export function showMemory(row, value) {
  fill(row.memory, value ? megabytes(value) : "");
}

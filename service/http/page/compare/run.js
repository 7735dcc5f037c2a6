// One comparison at a time: a new one cancels the one before, whose events are no longer shown.

import { Problem, lines, request } from "../parts/api.js";

/** @import {AnswerEvent, CompareEvent, EndEvent, ErrorEvent, PictureEvent} from "../types.js" */

/**
 * @typedef {object} Shown
 * @property {(event: PictureEvent) => void} picture
 * @property {(event: AnswerEvent) => void} answer
 * @property {(event: ErrorEvent) => void} error
 * @property {(event: EndEvent) => void} end
 */

let generation = 0;
let controller = new AbortController();

/** Cancel the comparison that is running; events that still arrive are dropped. */
export function cancel() {
  controller.abort();
  generation += 1;
}

/**
 * Send a picture to all models and show the answers as they come.
 *
 * @param {Blob} file
 * @param {Shown} shown
 * @returns {Promise<boolean>} false if another comparison took its place. Rejects with a Problem or Unreachable.
 */
export async function compare(file, shown) {
  cancel();
  const mine = generation;
  controller = new AbortController();
  const { signal } = controller;
  try {
    const response = await request("v1/compare?top_k=5", { method: "POST", body: file, signal });
    let ended = false;
    for await (const event of lines(response)) {
      // An abort ends the stream, but lines that were read before may still come.
      if (mine !== generation) return false;
      show(shown, event);
      ended ||= event.event === "end";
    }
    if (mine !== generation) return false;
    if (!ended) throw new Error("the answer ended before all models had answered");
    return true;
  } catch (error) {
    if (mine !== generation) return false;
    throw error;
  }
}

/** @param {Shown} shown @param {CompareEvent} event */
function show(shown, event) {
  if (event.event === "picture") shown.picture(event);
  else if (event.event === "answer") shown.answer(event);
  else if (event.event === "error") shown.error(event);
  else if (event.event === "end") shown.end(event);
}

/** @param {ErrorEvent} event */
export function problemOf(event) {
  return new Problem(event.problem);
}

// Why a family chose its model, in words.

/** @import {Plan} from "../types.js" */

/** @type {Record<string, string>} */
const REASONS = {
  most_accurate: "its most accurate model, and that is in time",
  deadline: "the most accurate of those that are in time",
  headroom: "a more accurate one would just be in time, but without enough to spare",
};

/** Why the chosen model, if it is in time. @param {Plan} plan */
export function becauseOf(plan) {
  return REASONS[plan.reason] ?? plan.reason;
}

/** What the chosen model is called: a request that no model can answer in time is refused. @param {Plan} plan */
export function title(plan) {
  return plan.in_time ? "chosen" : "nearest";
}

// Why a family chose its model, in words.

/** @import {Plan} from "../types.js" */

/** @type {Record<string, string>} */
const REASONS = {
  most_accurate: "its most accurate model, and that is in time",
  deadline: "the most accurate of those that are in time",
  headroom: "a more accurate one would just be in time, but without enough to spare to go back to it",
};

/** @param {Plan} plan */
export function becauseOf(plan) {
  if (!plan.in_time) return "none is sure to be in time, and it is the fastest";
  return REASONS[plan.reason] ?? plan.reason;
}

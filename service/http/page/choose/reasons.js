// Why a family chose its model, in words.

/** @import {Plan} from "../types.js" */

/** @type {Record<string, string>} */
const REASONS = {
  most_accurate: "its most accurate model meets the deadline",
  deadline: "the most accurate of those that meet the deadline",
  headroom: "a more accurate one would meet it, but with too little headroom",
};

/** Why the chosen model, if it is in time. @param {Plan} plan */
export function becauseOf(plan) {
  return REASONS[plan.reason] ?? plan.reason;
}

/** What the chosen model is called: a request that no model can answer in time is refused. @param {Plan} plan */
export function title(plan) {
  return plan.in_time ? "chosen" : "closest";
}

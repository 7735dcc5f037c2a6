// Models on trial: what a shadow or a canary has shown since the start.

import { h } from "../parts/dom.js";
import { ms, percent, whole } from "../parts/format.js";

/** @import {Rollout} from "../types.js" */

/** The table of the rollouts; empty if the service has none. @param {Rollout[]} rollouts */
export function onTrial(rollouts) {
  if (!rollouts.length) return [];
  const heads = ["share", "answered", "same top-1", "time", "of the primary", "errors", "fell back to the primary", "state"];
  return [
    h("h3", {}, "On trial"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "On trial" },
      h("table", { class: "numbers" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Candidate"), ...heads.map((head) => h("th", { scope: "col" }, head)))),
        h("tbody", {}, ...rollouts.map(row)))),
    h("p", { class: "hint" }, "Since the start. A shadow’s answers reach nobody, and its time is the engine’s; a canary’s is that of whole requests."),
  ];
}

/** @param {Rollout} rollout */
function row(rollout) {
  const same = rollout.compared ? `${percent(rollout.agree / rollout.compared)} of ${whole(rollout.compared)}` : "–";
  const canary = rollout.kind === "canary";
  const values = [percent(rollout.share, rollout.share < 0.01 ? 2 : 0), whole(rollout.candidate_images), same, ms(rollout.candidate_ms), ms(rollout.primary_ms),
    whole(rollout.errors), canary ? whole(rollout.fallbacks) : "–", rollout.state];
  return h("tr", {},
    h("th", { scope: "row" }, canary ? "Canary" : "Shadow", " ", h("code", {}, rollout.candidate), " for ", h("code", {}, rollout.primary)),
    ...values.map((value) => h("td", {}, value)));
}

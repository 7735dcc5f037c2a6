// The one place that says what went wrong, with the seconds to wait and a way to try again.

import { Problem, Unreachable } from "./api.js";
import { byId, fill, h } from "./dom.js";
import { changeKey, storedKey } from "./key.js";

/** @type {ReturnType<typeof setInterval> | undefined} */
let ticking;

/**
 * Show an error, in place of what was shown before.
 *
 * @param {unknown} error
 * @param {(() => void) | null} again what a press of "Try again" does
 */
export function complain(error, again = null) {
  clearInterval(ticking);
  const retryAfterMs = error instanceof Problem ? error.retryAfterMs : null;
  const button = again && mayHelp(error) && h("button", { type: "button", onclick: () => { settle(); again(); } }, "Try again");
  const otherKey = again && error instanceof Problem && error.status === 403 && storedKey() !== null &&
    h("button", { type: "button", onclick: () => { settle(); changeKey(again); } }, "Use another key");
  const close = h("button", { type: "button", class: "close", "aria-label": "Close this message", onclick: settle }, "×");
  fill(byId("notice"), h("p", {}, h("strong", {}, headline(error)), " ", sentence(error)), button, otherKey, close);
  byId("notice").hidden = false;
  if (retryAfterMs === null || !button) return;
  // Nobody should have to count: the button is enabled when there should be room again.
  const ready = performance.now() + retryAfterMs;
  const tick = () => {
    const left = Math.ceil((ready - performance.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(ticking);
  };
  tick();
  ticking = setInterval(tick, 250);
}

/** Whether the same request may succeed later: a broken file stays broken. @param {unknown} error */
function mayHelp(error) {
  return !(error instanceof Problem) || error.status === 408 || error.status === 429 || error.status >= 500;
}

/** Remove the notice: nothing is wrong any more. */
export function settle() {
  clearInterval(ticking);
  byId("notice").hidden = true;
  fill(byId("notice"));
}

/** Have screen readers read out a text. @param {string} text */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** @param {unknown} error */
function headline(error) {
  if (error instanceof Unreachable) return "The service does not answer.";
  if (!(error instanceof Problem)) return "This did not work.";
  /** @type {Record<number, string>} */
  const known = {
    400: "This file cannot be read.",
    403: "Not allowed.",
    413: "This file is too large.",
    415: "This is no picture of a supported type.",
    422: "This cannot be used.",
    429: "The service is busy.",
    503: "The service is not ready.",
    504: "Not in time.",
  };
  return known[error.status] ?? "The service refused.";
}

/** @param {unknown} error */
function sentence(error) {
  // Advice on how to send a file with curl is for other clients.
  const text = (error instanceof Error ? error.message : String(error)).replace(/[:;,]? (for example )?with curl.*$/, "");
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

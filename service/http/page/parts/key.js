// The API key: asked for in a form when the service wants one, kept for this tab of the browser only.

import { byId } from "./dom.js";

const NAME = "stridevit-api-key";

/** @type {Set<{key: string | null, resolve: () => void}>} */
const waiting = new Set();

/** @returns {string | null} */
export function storedKey() {
  return sessionStorage.getItem(NAME);
}

/**
 * Wait until there is a key other than the one that was refused. All requests that need one wait for the same form.
 *
 * @param {string | null} refused
 * @param {AbortSignal | null} signal
 * @returns {Promise<void>}
 */
export function askForKey(refused, signal) {
  if (storedKey() !== refused) return Promise.resolve();
  show(refused === null ? "This service needs an API key." : "This key was not accepted.");
  return new Promise((resolve, reject) => {
    const entry = { key: refused, resolve };
    waiting.add(entry);
    signal?.addEventListener("abort", () => {
      waiting.delete(entry);
      reject(new DOMException("cancelled", "AbortError"));
    });
  });
}

/** Make the form work; once, at start. */
export function installKeyForm() {
  form().addEventListener("submit", (event) => {
    event.preventDefault();
    const key = field().value.trim();
    if (!key) return;
    // What a header cannot carry would fail like a service that is not there.
    if (/[^\x21-\x7e]/.test(key)) return show("This key has a character that no API key has, perhaps an invisible one: copy it again.");
    sessionStorage.setItem(NAME, key);
    field().value = "";
    form().hidden = true;
    const entries = [...waiting];
    waiting.clear();
    for (const entry of entries) entry.resolve();
    byId("main").focus();
  });
}

/** Ask for another key in place of one that is valid but not allowed to do something, then call `again`. @param {() => void} again */
export function changeKey(again) {
  sessionStorage.removeItem(NAME);
  void askForKey(null, null).then(again);
}

/** @param {string} message */
function show(message) {
  byId("key-message").textContent = message;
  if (!form().hidden) return;
  form().hidden = false;
  field().focus();
}

const form = () => /** @type {HTMLFormElement} */ (byId("key-form"));
const field = () => /** @type {HTMLInputElement} */ (byId("key"));

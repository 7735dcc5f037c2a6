// What is shown, in the URL's hash: #tab?name=value. A reload, a bookmark or a link shows the same again.

export const TABS = /** @type {const} */ (["compare", "tokens", "choose", "live"]);
/** @typedef {typeof TABS[number]} Tab */

/** @type {Set<() => void>} */
const listeners = new Set();

/** @returns {{tab: Tab, values: URLSearchParams}} */
export function current() {
  const [name, query = ""] = location.hash.slice(1).split("?", 2);
  const tab = TABS.find((known) => known === name) ?? "compare";
  return { tab, values: new URLSearchParams(query) };
}

/**
 * A value of the hash as a number within bounds.
 *
 * @param {string} name
 * @param {{min: number, max: number, otherwise: number}} bounds
 */
export function number(name, { min, max, otherwise }) {
  const text = current().values.get(name);
  const value = Number(text);
  return text === null || text === "" || !Number.isFinite(value) ? otherwise : Math.min(max, Math.max(min, value));
}

/** The link to a tab that keeps the other values. @param {Tab} tab */
export function href(tab) {
  const query = current().values.toString();
  return `#${tab}${query ? `?${query}` : ""}`;
}

/**
 * Change values of the hash without an entry in the history; null removes one.
 *
 * @param {Record<string, string | number | null>} changes
 */
export function update(changes) {
  const { tab, values } = current();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) values.delete(name);
    else values.set(name, String(value));
  }
  const query = values.toString();
  history.replaceState(null, "", `#${tab}${query ? `?${query}` : ""}`);
  for (const listener of listeners) listener();
}

/** Call after each `update`, which no event of the browser follows. @param {() => void} listener */
export function onChange(listener) {
  listeners.add(listener);
}

export const DEADLINE = { min: 5, max: 2000, otherwise: 50 };
/** The deadline of the tabs Compare and Choose, in milliseconds. */
export const deadlineMs = () => number("deadline", DEADLINE);

// The four tabs: which is shown is in the URL's hash.

import { hideCompare, installCompare, showCompare } from "./compare/tab.js";
import { Unreachable } from "./parts/api.js";
import { byId } from "./parts/dom.js";
import { installKeyForm } from "./parts/key.js";
import { complain, settle } from "./parts/notice.js";
import { TABS, current, href, onChange } from "./parts/state.js";

/** @typedef {{show: () => unknown, hide?: () => void}} Shown What a tab does when it appears or its hash has changed, and when it goes. */

/** Loaded when they are first shown. @type {Record<import("./parts/state.js").Tab, () => Promise<Shown>>} */
const LOADERS = {
  compare: async () => ({ show: showCompare, hide: hideCompare }),
  tokens: async () => (await import("./tokens/tab.js")).tokensTab(),
  choose: async () => (await import("./choose/tab.js")).chooseTab(),
  live: async () => (await import("./live/tab.js")).liveTab(),
};

/** @type {Partial<Record<import("./parts/state.js").Tab, Promise<Shown>>>} */
const loaded = {};
/** @type {import("./parts/state.js").Tab | null} */
let shown = null;

/** Links to tabs keep what is shown. @param {import("./parts/state.js").Tab} tab the current one */
function relink(tab) {
  for (const link of /** @type {NodeListOf<HTMLAnchorElement>} */ (document.querySelectorAll("a[href^='#']"))) {
    const own = TABS.find((name) => name === link.hash.slice(1).split("?")[0]);
    if (!own) continue;
    link.href = href(own);
    if (own !== tab) link.removeAttribute("aria-current");
    else if (link.closest("#tabs")) link.setAttribute("aria-current", "page");
  }
}

async function route() {
  const { tab } = current();
  relink(tab);
  if (tab === shown) return (await loaded[tab]?.catch(() => null))?.show();
  const before = shown;
  shown = tab;
  // What went wrong on another tab does not concern this one.
  if (before) settle();
  for (const other of TABS) byId(other).hidden = other !== tab;
  document.title = `${tab.charAt(0).toUpperCase()}${tab.slice(1)} · StrideViT`;
  if (before) (await loaded[before]?.catch(() => null))?.hide?.();
  const next = await module(tab);
  if (next && shown === tab) await next.show();
}

/** A tab's module, or null if it could not be loaded, which the page then reports. @param {import("./parts/state.js").Tab} tab */
async function module(tab) {
  try {
    return await (loaded[tab] ??= LOADERS[tab]());
  } catch (error) {
    // Forgotten, so that the next visit to the tab tries again. By the HTML standard a module that could not be fetched
    // stays failed for the life of the document, and some browsers keep to it: then only loading the page anew helps.
    delete loaded[tab];
    if (shown === tab) {
      complain(new Unreachable(`the tab ${tab} could not be loaded`, { cause: error }), () => location.reload());
    }
    return null;
  }
}

installKeyForm();
installCompare();
// A hash would lead to another tab.
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
onChange(() => relink(current().tab));
addEventListener("hashchange", () => void route());
void route();

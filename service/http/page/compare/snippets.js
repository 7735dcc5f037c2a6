// The request that this page has made, for a shell and for Python.

import { fill, h } from "../parts/dom.js";
import { storedKey } from "../parts/key.js";

const quoted = (/** @type {string} */ text) => `'${text.replaceAll("'", "'\\''")}'`;
const url = () => new URL("v1/compare?top_k=5", document.baseURI).href;
/** The key itself is never written anywhere. */
const HEADER = "X-API-Key";

/** @param {string} name of the picture's file */
export function asCurl(name) {
  const key = storedKey() ? ` \\\n  --header "${HEADER}: $STRIDEVIT_API_KEY"` : "";
  return `curl --no-buffer --data-binary @${quoted(name)}${key} \\\n  ${quoted(url())}`;
}

/** @param {string} name of the picture's file */
export function asPython(name) {
  const key = Boolean(storedKey());
  return [
    ...(key ? ["import os"] : []),
    "import httpx",
    "",
    `with open(${JSON.stringify(name)}, "rb") as picture:`,
    `    request = {"content": picture.read()${key ? `, "headers": {"${HEADER}": os.environ["STRIDEVIT_API_KEY"]}` : ""}}`,
    `with httpx.stream("POST", ${JSON.stringify(url())}, **request) as answer:`,
    "    for line in answer.iter_lines():  # one JSON object a line, as each model answers",
    "        print(line)",
  ].join("\n");
}

/** Buttons that copy the request, and show it in case the clipboard is unavailable. @param {() => string} name */
export function copyButtons(name) {
  const shown = h("pre", { class: "snippet", tabindex: "0", hidden: true, "aria-label": "The request" });
  const said = h("span", { class: "said", role: "status" });
  const copy = async (/** @type {string} */ text) => {
    fill(shown, text);
    shown.hidden = false;
    try {
      await navigator.clipboard.writeText(text);
      fill(said, "copied");
    } catch {
      // Browsers allow the clipboard on https: and localhost only.
      getSelection()?.selectAllChildren(shown);
      fill(said, "selected: copy it from here");
    }
  };
  return h(
    "div",
    { class: "copy" },
    h("div", { class: "buttons" },
      h("button", { type: "button", onclick: () => copy(asCurl(name())) }, "Copy as curl"),
      h("button", { type: "button", onclick: () => copy(asPython(name())) }, "Copy as Python"),
      said),
    shown,
  );
}

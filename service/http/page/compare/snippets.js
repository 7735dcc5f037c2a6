// The request that this page has made, for a shell and for Python.

import { fill, h } from "../parts/dom.js";
import { storedKey } from "../parts/key.js";

const quoted = (/** @type {string} */ text) => `'${text.replaceAll("'", "'\\''")}'`;
const url = () => new URL("v1/compare?top_k=5", document.baseURI).href;
/** The key itself is never written anywhere. */
const HEADER = "X-API-Key";

/** @import {Picture} from "./picture.js" */

/** The URL of the file if it is a sample, which is not where the command is run. @param {Picture | null} picture */
const sampleUrl = (picture) => picture?.sample && new URL(`page/samples/${picture.sample}.jpg`, document.baseURI).href;

/** @param {Picture | null} picture */
export function asCurl(picture) {
  const key = storedKey() ? ` \\\n  --header "${HEADER}: $STRIDEVIT_API_KEY"` : "";
  const source = sampleUrl(picture);
  const [from, data] = source ? [`curl -s ${quoted(source)} | `, "-"] : ["", quoted(picture?.name ?? "picture.jpg")];
  return `${from}curl --no-buffer --data-binary @${data}${key} \\\n  ${quoted(url())}`;
}

/** @param {Picture | null} picture */
export function asPython(picture) {
  const key = Boolean(storedKey());
  const source = sampleUrl(picture);
  const read = source ? [`picture = httpx.get(${JSON.stringify(source)}).content`] :
    [`with open(${JSON.stringify(picture?.name ?? "picture.jpg")}, "rb") as file:`, "    picture = file.read()"];
  return [
    ...(key ? ["import os"] : []),
    "import httpx",
    "",
    ...read,
    ...(key ? [`headers = {"${HEADER}": os.environ["STRIDEVIT_API_KEY"]}`] : []),
    `with httpx.stream("POST", ${JSON.stringify(url())}, content=picture${key ? ", headers=headers" : ""}) as answer:`,
    "    for line in answer.iter_lines():  # one JSON object per line, as each model answers",
    "        print(line)",
  ].join("\n");
}

/**
 * Buttons that copy the request, and show it in case the clipboard is unavailable.
 *
 * @param {() => Picture | null} picture
 * @param {(listener: () => void) => void} onPicture
 */
export function copyButtons(picture, onPicture) {
  const shown = h("pre", { class: "snippet", tabindex: "0", hidden: true, "aria-label": "The request" });
  const said = h("span", { class: "said", role: "status" });
  let copied = picture();
  onPicture(() => {
    // The request for another picture is another one.
    if (picture() === copied) return;
    shown.hidden = true;
    fill(said);
  });
  const copy = async (/** @type {string} */ text) => {
    copied = picture();
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
      h("button", { type: "button", onclick: () => copy(asCurl(picture())) }, "Copy as curl"),
      h("button", { type: "button", onclick: () => copy(asPython(picture())) }, "Copy as Python"),
      said),
    shown,
  );
}

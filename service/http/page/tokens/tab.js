// Tokens: the grid of patches over the picture, and what each key and value is made from.

import { SAMPLES, asSeenBy, onPicture } from "../compare/picture.js";
import { byId, fill, h } from "../parts/dom.js";
import { counted, kind, percent, whole } from "../parts/format.js";
import { detail, hue, models, precisionOf, ready } from "../parts/models.js";
import { complain } from "../parts/notice.js";
import { current, href, number, update } from "../parts/state.js";
import { Drawing } from "./drawing.js";
import { layout, unseen } from "./windows.js";

/** @import {Model} from "../types.js" */
/** @import {Layout} from "./windows.js" */

/** @type {Layout | null} */
let made = null;
/** @type {Drawing | null} */
let drawing = null;
let selected = 0;
/** Counts the views asked for: what is ready later than a newer one is dropped. */
let latest = 0;

/** The tab's view. */
export function tokensTab() {
  onPicture(() => {
    if (!byId("tokens").hidden) void show();
  });
  return { show };
}

async function show() {
  latest += 1;
  const mine = latest;
  try {
    const all = ready(await models()).filter((model) => model.kv_tokens && precisionOf(model) === "fp32");
    const first = all[0];
    if (!first) return fill(byId("tokens-content"), h("p", {}, "No ready model describes its attention in its manifest."));
    const named = current().values.get("model");
    const model = all.find((other) => other.name === named) ?? all.find((other) => other.variant?.startsWith("csra")) ?? first;
    const found = await detail(model.name);
    if (mine !== latest) return;
    const { attention, input } = found.manifest;
    if (!attention) throw new Error(`the manifest of ${model.name} does not describe its attention`);
    const [, height = 0, width = 0] = input.shape;
    made = layout(attention, height, width);
    const count = made.windows.length;
    selected = Math.floor(number("token", { min: 1, max: count, otherwise: Math.floor(count / 2 + made.keyColumns / 2) + 1 })) - 1;
    build(all, model, made);
  } catch (error) {
    complain(error, () => void show());
  }
}

/** @param {Model[]} all @param {Model} model @param {Layout} layout */
function build(all, model, layout) {
  const hadFocus = document.activeElement?.id ?? "";
  const seen = asSeenBy(model.name);
  const named = SAMPLES.find(({ name }) => name === current().values.get("sample"))?.name ?? "raccoon";
  const image = seen ? { url: seen.url, pixelated: seen.width < 160 } : { url: `page/samples/${named}.jpg`, pixelated: false };
  drawing = new Drawing(layout, image, hue(model), select);
  fill(byId("tokens-content"),
    h("fieldset", { class: "choice-of-model" }, h("legend", {}, "Model"), ...all.map((other) => option(other, other === model))),
    h("div", { class: "tokens" },
      h("figure", {}, h("figcaption", {}, h("strong", {}, `Queries: ${counted(layout.rows * layout.columns, "patch", "patches")}`),
        h("span", { class: "hint" }, `${layout.rows} × ${layout.columns}, for every model`)), drawing.patches,
        !seen && h("p", { class: "hint" }, "A sample. ", h("a", { href: href("compare") }, "Compare a picture"), " to see it here, as the models see it.")),
      h("figure", {}, h("figcaption", {}, h("strong", {}, `Keys and values: ${counted(layout.windows.length, "token")}`),
        h("span", { class: "hint" }, "each in the mean colour of its patches")), drawing.keys,
        h("p", { class: "hint" }, "Point at a token, or use the arrow keys, to see its patches.")),
      h("div", { class: "explained" }, ...explanation(model, layout))));
  select(selected, false);
  if (hadFocus) document.getElementById(hadFocus)?.focus();
}

/** @param {Model} model @param {boolean} checked */
function option(model, checked) {
  const input = h("input", { type: "radio", name: "tokens-model", id: `tokens-${model.name}`, value: model.name });
  input.checked = checked;
  input.addEventListener("change", () => {
    update({ model: model.name, token: null });
    void show();
  });
  return h("label", {}, input, h("span", { class: `dot m${hue(model)}` }), kind(model), h("small", {}, ` ${model.kv_tokens}`));
}

/** @param {number} index @param {boolean} [remembered] */
function select(index, remembered = true) {
  if (!made || !drawing) return;
  selected = index;
  drawing.select(index);
  fill(byId("selected-window"), describe(made, index));
  if (remembered) update({ token: index + 1 });
}

/** @param {Layout} layout @param {number} index */
export function describe(layout, index) {
  const window = layout.windows[index];
  if (!window) return "";
  const first = window.patches[0] ?? 0, last = window.patches.at(-1) ?? 0;
  const place = (/** @type {number} */ patch) => `row ${Math.floor(patch / layout.columns) + 1}, column ${(patch % layout.columns) + 1}`;
  const from = window.patches.length === 1 ? `the patch in ${place(first)}` : `${window.patches.length} patches, from ${place(first)} to ${place(last)}`;
  const beyond = window.frame ? 9 - window.patches.length : 0;
  return `Token ${index + 1} of ${layout.windows.length} is made from ${from}${beyond ? `, and ${beyond} places beyond the edge, which count as zero` : ""}.`;
}

/** @param {Model} model @param {Layout} layout */
function explanation(model, layout) {
  const patches = layout.rows * layout.columns, tokens = layout.windows.length, left = unseen(layout).length;
  const how = {
    mha: "Every patch has a key and a value of its own, and every query attends to all of them.",
    csra: `A 3 × 3 convolution over the grid of patches, with stride ${layout.rate}, makes one key and value per window: neighbours in both directions are merged.`,
    lsra: `Each run of ${layout.rate} patches, in reading order, is pooled into one key and value, weighted by what the patches contain. A run may continue on the next row.`,
  }[layout.kind];
  return [
    h("h3", {}, kind(model)),
    h("p", {}, how),
    h("p", { id: "selected-window", class: "selected", role: "status" }),
    h("table", { class: "facts" },
      h("tbody", {},
        fact("Query–key pairs per layer", `${patches} × ${tokens} = ${whole(patches * tokens)}`),
        fact("Share of full attention", percent(tokens / patches, tokens / patches < 0.1 ? 1 : 0)),
        fact("Test top-1", model.accuracy ? percent(model.accuracy.top1) : "not measured"),
        left > 0 && fact("In no window (hatched)", `${left} of ${patches}`))),
    left > 0 && h("p", { class: "hint" }, "A hatched patch has no key or value, but it keeps its query, and its output is part of the result."),
    h("p", { class: "hint" }, "Drawn from the model’s manifest alone, which states grid and compression."),
  ];
}

/** @param {string} name @param {string} value */
function fact(name, value) {
  return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value));
}

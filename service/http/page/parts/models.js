// What the service serves, read once and again on demand, and the colour of each model.

import { getJson } from "./api.js";
import { ownName } from "./format.js";

/** @import {Model, ModelDetail, ModelList} from "../types.js" */

/** @typedef {{base: Model, others: Model[]}} Group A model, and the same in other precisions. */

/** @type {Promise<ModelList> | null} */
let list = null;
/** @type {Map<string, Promise<ModelDetail>>} */
const details = new Map();

/** All models and families. @param {{again?: boolean}} [options] @returns {Promise<ModelList>} */
export function models({ again = false } = {}) {
  if (again || !list) {
    const asked = getJson("v1/models");
    list = asked;
    // A request that failed is repeated next time.
    asked.catch(() => {
      if (list === asked) list = null;
    });
  }
  return list;
}

/** @param {string} name @returns {Promise<ModelDetail>} */
export function detail(name) {
  let found = details.get(name);
  if (!found) {
    found = getJson(`v1/models/${encodeURIComponent(name)}`);
    details.set(name, found);
    found.catch(() => details.delete(name));
  }
  return /** @type {Promise<ModelDetail>} */ (found);
}

/** Each model once, in its newest version that takes traffic if there is one; the most accurate first. @param {ModelList} all */
export function newest(all) {
  /** @type {Map<string, Model>} */
  const found = new Map();
  const rank = (/** @type {Model} */ model) => [model.state === "ready" ? 1 : 0, model.version ?? 0];
  for (const model of all.models) {
    const known = found.get(model.name);
    const [state = 0, version = 0] = rank(model), [knownState = 0, knownVersion = 0] = known ? rank(known) : [-1, 0];
    if (state > knownState || (state === knownState && version > knownVersion)) found.set(model.name, model);
  }
  return [...found.values()].sort((one, other) => top1(other) - top1(one));
}

/** Those that take traffic. @param {ModelList} all */
export function ready(all) {
  return newest(all).filter((model) => model.state === "ready");
}

/** Models with their other precisions folded under them. @param {Model[]} sorted @returns {Group[]} */
export function groups(sorted) {
  const names = new Map(sorted.map((model) => [model.name, model]));
  const baseOf = (/** @type {Model} */ model) => {
    const precision = precisionOf(model);
    return model.name.endsWith(`-${precision}`) ? names.get(model.name.slice(0, -precision.length - 1)) : undefined;
  };
  return sorted
    .filter((model) => !baseOf(model))
    .map((base) => ({ base, others: sorted.filter((model) => baseOf(model) === base) }));
}

/** The precision of a model: that of one that does not serve is known only from its name. @param {Model} model */
export function precisionOf(model) {
  return model.precision ?? /-(int8|fp16)$/.exec(model.name)?.[1] ?? "fp32";
}

/** Families that choose among several models, with the default model's first. @param {ModelList} all */
export function choosingFamilies(all) {
  const preferred = all.models.find((model) => model.default)?.family;
  return Object.keys(all.families)
    .filter((name) => (all.families[name] ?? []).length > 1)
    .sort((one, other) => Number(other === preferred) - Number(one === preferred));
}

/** @param {Model | undefined} model */
export function top1(model) {
  return model?.accuracy?.top1 ?? -1;
}

const FIXED = ["mha", "lsra-r2", "lsra-r4", "csra-r2", "csra-r4"];
/** @type {string[]} */
const others = [];

/** The number of a model's colour, the same for all its precisions. @param {Model | undefined} model */
export function hue(model) {
  const name = model?.architecture ? ownName(model) : "";
  const fixed = FIXED.indexOf(name);
  if (fixed >= 0) return fixed;
  if (!others.includes(name)) others.push(name);
  return FIXED.length + (others.indexOf(name) % 3);
}

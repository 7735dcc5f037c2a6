// Numbers and names as people read them.

/** @import {Model} from "../types.js" */

/** A time, with the digits that a difference of two is seen by. @param {number | null | undefined} value */
export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${(value / 1000).toFixed(value < 10_000 ? 1 : 0)} s`;
  return `${value.toFixed(value < 100 && !Number.isInteger(value) ? 1 : 0)} ms`;
}

/** @param {number} share @param {number} [digits] */
export function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

/** A difference with its sign; a true minus is as wide as a plus. @param {number} value @param {number} [digits] */
export function signed(value, digits = 1) {
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? `±${text}` : `${value < 0 ? "−" : "+"}${text}`;
}

/** A difference of shares in percentage points, with the digits that it takes to see one. @param {number} share */
export function points(share) {
  const value = 100 * share;
  return `${signed(value, value !== 0 && Math.abs(value) < 0.05 ? 2 : 1)} pt`;
}

/** A difference of times. @param {number} value */
export function signedMs(value) {
  return `${signed(value, Math.abs(value) < 100 ? 1 : 0)} ms`;
}

/** @param {number | null | undefined} count */
export function millions(count) {
  return count ? `${(count / 1e6).toFixed(count < 1e7 ? 2 : 1)}\u00a0M` : "–";
}

/** @param {number} count */
export function whole(count) {
  return Math.round(count).toLocaleString("en");
}

/** @param {number | null | undefined} megabytes */
export function megabytes(megabytes) {
  return megabytes ? `${megabytes.toFixed(megabytes < 100 ? 1 : 0)} MB` : "–";
}

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172_800 ? `${(seconds / 3600).toFixed(0)} h` : `${(seconds / 86_400).toFixed(0)} days`;
}

/** @param {string} text */
export function label(text) {
  return text.replaceAll("_", " ");
}

/** @param {number} count @param {string} one @param {string} [many] */
export function counted(count, one, many = `${one}s`) {
  return `${whole(count)} ${count === 1 ? one : many}`;
}

/** A model's name without family and precision: its variant, unless it was named otherwise. @param {Model} model */
export function ownName(model) {
  const family = `${model.family}-`, precision = `-${model.precision}`;
  const name = model.name.startsWith(family) ? model.name.slice(family.length) : model.name;
  return name.endsWith(precision) ? name.slice(0, -precision.length) : name;
}

/**
 * What kind of attention a model has, in a few words; for architectures without variants, their own name. A model that is
 * not named after its variant differs in size from those that are.
 *
 * @param {Model | undefined} model
 */
export function kind(model) {
  const variant = model?.variant ?? "";
  const rate = /r(\d+)$/.exec(variant)?.[1];
  const size = model?.params && ownName(model) !== variant ? `, ${millions(model.params)}` : "";
  if (variant === "mha") return `Full attention${size}`;
  if (variant.startsWith("csra") && rate) return `C-SRA, stride ${rate}${size}`;
  if (variant.startsWith("lsra") && rate) return `L-SRA, runs of ${rate}${size}`;
  return model?.architecture ?? variant;
}

/** The same with its precision, where that is not the usual one. @param {Model | undefined} model */
export function kindAndPrecision(model) {
  return model?.precision && model.precision !== "fp32" ? `${kind(model)}, ${model.precision}` : kind(model);
}

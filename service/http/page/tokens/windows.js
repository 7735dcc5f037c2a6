// Which patches each key and value is made from: pure geometry, from what a model's manifest says.

/** @import {Attention} from "../types.js" */

/**
 * @typedef {object} Layout
 * @property {number} rows of the grid of patches
 * @property {number} columns
 * @property {number} keyRows of the grid of keys and values, as they are drawn
 * @property {number} keyColumns
 * @property {"mha" | "csra" | "lsra"} kind
 * @property {number} rate 1 for MHA
 * @property {Window[]} windows one for each key and value, in their order
 */
/**
 * @typedef {object} Window
 * @property {number[]} patches in reading order
 * @property {{top: number, left: number, height: number, width: number} | null} frame of a 3×3 window, which may reach
 *   beyond the picture: what it sees there is zero
 */

/**
 * The layout of a model with square patches. Throws if the numbers do not fit each other.
 *
 * @param {Attention} attention
 * @param {number} height of the picture, in pixels
 * @param {number} width
 * @returns {Layout}
 */
export function layout(attention, height, width) {
  const patch = Math.sqrt((height * width) / attention.tokens);
  const rows = Math.round(height / patch), columns = Math.round(width / patch);
  if (rows * columns !== attention.tokens) throw new Error(`${attention.tokens} tokens do not make a grid of square patches`);
  const made = attention.stride ? csra(rows, columns, attention.stride)
    : attention.block_size ? lsra(rows, columns, attention.block_size)
    : mha(rows, columns);
  if (made.windows.length !== attention.kv_tokens) {
    throw new Error(`${made.windows.length} windows where the model has ${attention.kv_tokens} keys and values`);
  }
  return made;
}

/** Patches that no key or value sees directly. @param {Layout} made @returns {number[]} */
export function unseen({ rows, columns, windows }) {
  const seen = new Set(windows.flatMap((window) => window.patches));
  return range(rows * columns).filter((patch) => !seen.has(patch));
}

/** @param {number} rows @param {number} columns @returns {Layout} */
function mha(rows, columns) {
  const windows = range(rows * columns).map((patch) => ({ patches: [patch], frame: null }));
  return { rows, columns, keyRows: rows, keyColumns: columns, kind: "mha", rate: 1, windows };
}

/** Windows of 3×3 patches, the stride apart; padding 1, so the first one is around the first patch. @param {number} rows @param {number} columns @param {number} stride @returns {Layout} */
function csra(rows, columns, stride) {
  const keyRows = Math.ceil(rows / stride), keyColumns = Math.ceil(columns / stride);
  const windows = range(keyRows * keyColumns).map((index) => {
    const top = Math.floor(index / keyColumns) * stride - 1, left = (index % keyColumns) * stride - 1;
    const patches = range(9)
      .map((cell) => ({ row: top + Math.floor(cell / 3), column: left + (cell % 3) }))
      .filter(({ row, column }) => row >= 0 && row < rows && column >= 0 && column < columns)
      .map(({ row, column }) => row * columns + column);
    return { patches, frame: { top, left, height: 3, width: 3 } };
  });
  return { rows, columns, keyRows, keyColumns, kind: "csra", rate: stride, windows };
}

/** Runs of consecutive patches, which go on in the next row; the last may be shorter. @param {number} rows @param {number} columns @param {number} size @returns {Layout} */
function lsra(rows, columns, size) {
  const tokens = rows * columns, count = Math.ceil(tokens / size);
  const windows = range(count).map((index) => ({
    patches: range(Math.min(size, tokens - index * size)).map((offset) => index * size + offset),
    frame: null,
  }));
  // Drawn under the patches they come from where whole runs fit into a row.
  const keyColumns = columns % size === 0 ? columns / size : Math.ceil(Math.sqrt(count));
  return { rows, columns, keyRows: Math.ceil(count / keyColumns), keyColumns, kind: "lsra", rate: size, windows };
}

/** @param {number} count */
function range(count) {
  return Array.from({ length: count }, (_, index) => index);
}

// Two drawings that belong together: the patches over the picture, and the keys and values made from them.

import { svg } from "../parts/dom.js";
import { unseen } from "./windows.js";

/** @import {Layout} from "./windows.js" */

const UNIT = 40;

export class Drawing {
  #layout;
  #onSelect;
  /** @type {SVGElement[]} */
  #cells = [];
  #marks = svg("g", { class: "marks" });
  #selected = 0;

  /**
   * @param {Layout} layout
   * @param {string | null} url of the picture
   * @param {number} hue
   * @param {(index: number) => void} onSelect
   */
  constructor(layout, url, hue, onSelect) {
    this.#layout = layout;
    this.#onSelect = onSelect;
    this.patches = this.#drawPatches(url, hue);
    this.keys = this.#drawKeys(hue);
  }

  /** @param {number} index */
  select(index) {
    const window = this.#layout.windows[index];
    if (!window) return;
    this.#cells[this.#selected]?.classList.remove("on");
    this.#cells[index]?.classList.add("on");
    this.#selected = index;
    const { columns } = this.#layout;
    const squares = window.patches.map((patch) =>
      square(patch % columns, Math.floor(patch / columns), { class: "patch" }));
    const frame = window.frame && svg("rect", { class: "frame", x: window.frame.left * UNIT, y: window.frame.top * UNIT,
      width: window.frame.width * UNIT, height: window.frame.height * UNIT });
    this.#marks.replaceChildren(...squares, ...(frame ? [frame] : []));
    const [first = 0] = window.patches;
    this.keys.setAttribute("aria-valuenow", String(index + 1));
    this.keys.setAttribute("aria-valuetext", `token ${index + 1}, ${window.patches.length} patches from row ${Math.floor(first / columns) + 1}, column ${(first % columns) + 1}`);
  }

  /** @param {string | null} url @param {number} hue */
  #drawPatches(url, hue) {
    const { rows, columns, windows } = this.#layout;
    const width = columns * UNIT, height = rows * UNIT;
    const drawn = svg("svg", { viewBox: `${-UNIT} ${-UNIT} ${width + 2 * UNIT} ${height + 2 * UNIT}`, class: `patches m${hue}`, role: "img",
      "aria-label": `The picture in ${rows} × ${columns} patches` },
      svg("defs", {}, svg("pattern", { id: "hatch", width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        svg("rect", { width: 8, height: 8, class: "hatch-ground" }), svg("rect", { width: 3, height: 8, class: "hatch-line" }))),
      svg("rect", { width, height, class: "ground" }),
      url && svg("image", { href: url, width, height, preserveAspectRatio: "none", class: "pixelated" }),
      ...unseen(this.#layout).map((patch) => square(patch % columns, Math.floor(patch / columns), { fill: "url(#hatch)" })),
      grid(rows, columns),
      this.#marks);
    drawn.addEventListener("pointermove", (event) => {
      const box = drawn.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * (columns + 2)) - 1;
      const row = Math.floor(((event.clientY - box.top) / box.height) * (rows + 2)) - 1;
      if (row < 0 || column < 0 || row >= rows || column >= columns) return;
      const patch = row * columns + column;
      // Of the windows that overlap here the one whose middle is nearest.
      const index = windows
        .map((window, number) => ({ number, window }))
        .filter(({ window }) => window.patches.includes(patch))
        .sort((one, other) => this.#distance(one.number, row, column) - this.#distance(other.number, row, column))[0]?.number;
      if (index !== undefined && index !== this.#selected) this.#onSelect(index);
    });
    return drawn;
  }

  /** @param {number} index @param {number} row @param {number} column */
  #distance(index, row, column) {
    const frame = this.#layout.windows[index]?.frame;
    return frame ? Math.abs(frame.top + 1 - row) + Math.abs(frame.left + 1 - column) : 0;
  }

  /** @param {number} hue */
  #drawKeys(hue) {
    const { keyRows, keyColumns, windows } = this.#layout;
    const drawn = svg("svg", { viewBox: `-1 -1 ${keyColumns * UNIT + 2} ${keyRows * UNIT + 2}`, class: `keys m${hue}`, id: "keys", tabindex: 0, role: "slider",
      "aria-label": "Key and value", "aria-valuemin": 1, "aria-valuemax": windows.length, "aria-valuenow": 1 });
    this.#cells = windows.map((_, index) => {
      const cell = square(index % keyColumns, Math.floor(index / keyColumns), { class: "cell" });
      cell.addEventListener("pointerenter", () => this.#onSelect(index));
      return cell;
    });
    drawn.append(...this.#cells);
    drawn.addEventListener("keydown", (event) => {
      /** @type {Record<string, number>} */
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -keyColumns, ArrowDown: keyColumns };
      const ends = /** @type {Record<string, number>} */ ({ Home: 0, End: windows.length - 1 });
      const step = steps[event.key];
      const next = step === undefined ? ends[event.key] : this.#selected + step;
      if (next === undefined) return;
      event.preventDefault();
      if (next >= 0 && next < windows.length) this.#onSelect(next);
    });
    return drawn;
  }
}

/** @param {number} column @param {number} row @param {Record<string, unknown>} attributes */
function square(column, row, attributes) {
  return svg("rect", { x: column * UNIT, y: row * UNIT, width: UNIT, height: UNIT, ...attributes });
}

/** @param {number} rows @param {number} columns */
function grid(rows, columns) {
  const lines = [
    ...Array.from({ length: rows + 1 }, (_, row) => `M0 ${row * UNIT}H${columns * UNIT}`),
    ...Array.from({ length: columns + 1 }, (_, column) => `M${column * UNIT} 0V${rows * UNIT}`),
  ];
  return svg("path", { d: lines.join(""), class: "grid" });
}

// Two drawings of one size that belong together: the patches over the picture, and the keys and values made from them.

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
  #mark = svg("rect", { class: "on" });
  #selected = 0;

  /**
   * @param {Layout} layout
   * @param {{url: string, pixelated: boolean} | null} image
   * @param {number} hue
   * @param {(index: number) => void} onSelect
   */
  constructor(layout, image, hue, onSelect) {
    this.#layout = layout;
    this.#onSelect = onSelect;
    const { rows, columns } = layout;
    // A window at the edge reaches beyond the picture by one patch.
    const margin = layout.kind === "csra" ? UNIT : 2;
    this.viewBox = `${-margin} ${-margin} ${columns * UNIT + 2 * margin} ${rows * UNIT + 2 * margin}`;
    this.patches = this.#drawPatches(image, hue, margin);
    this.keys = this.#drawKeys(hue);
    if (image) void this.#paint(image.url);
  }

  /** @param {number} index */
  select(index) {
    const window = this.#layout.windows[index], cell = this.#cells[index];
    if (!window || !cell) return;
    for (const name of ["x", "y", "width", "height"]) this.#mark.setAttribute(name, cell.getAttribute(name) ?? "0");
    this.#selected = index;
    const { columns } = this.#layout;
    const squares = window.patches.map((patch) => square(patch % columns, Math.floor(patch / columns), { class: "patch" }));
    const frame = window.frame && svg("rect", { class: "frame", x: window.frame.left * UNIT, y: window.frame.top * UNIT,
      width: window.frame.width * UNIT, height: window.frame.height * UNIT });
    this.#marks.replaceChildren(...squares, ...(frame ? [frame] : []));
    const [first = 0] = window.patches;
    this.keys.setAttribute("aria-valuenow", String(index + 1));
    this.keys.setAttribute("aria-valuetext", `token ${index + 1}, ${window.patches.length} patches from row ${Math.floor(first / columns) + 1}, column ${(first % columns) + 1}`);
  }

  /** @param {{url: string, pixelated: boolean} | null} image @param {number} hue @param {number} margin */
  #drawPatches(image, hue, margin) {
    const { rows, columns, windows } = this.#layout;
    const width = columns * UNIT, height = rows * UNIT;
    const drawn = svg("svg", { viewBox: this.viewBox, class: `patches m${hue}`, role: "img", "aria-label": `The picture in ${rows} × ${columns} patches` },
      svg("defs", {}, svg("pattern", { id: "hatch", width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        svg("rect", { width: 8, height: 8, class: "hatch-ground" }), svg("rect", { width: 3, height: 8, class: "hatch-line" }))),
      svg("rect", { width, height, class: "ground" }),
      image && svg("image", { href: image.url, width, height, preserveAspectRatio: "none", class: image.pixelated ? "pixelated" : "" }),
      ...unseen(this.#layout).map((patch) => square(patch % columns, Math.floor(patch / columns), { fill: "url(#hatch)" })),
      grid(rows, columns),
      this.#marks);
    const pointAt = (/** @type {PointerEvent} */ event) => {
      const box = drawn.getBoundingClientRect(), scale = (width + 2 * margin) / box.width;
      const column = Math.floor(((event.clientX - box.left) * scale - margin) / UNIT);
      const row = Math.floor(((event.clientY - box.top) * scale - margin) / UNIT);
      if (row < 0 || column < 0 || row >= rows || column >= columns) return;
      // Of the windows that overlap here, take the one whose centre is nearest.
      const [nearest] = windows
        .map((window, number) => ({ number, window }))
        .filter(({ window }) => window.patches.includes(row * columns + column))
        .sort((one, other) => this.#distance(one.number, row, column) - this.#distance(other.number, row, column));
      if (nearest && nearest.number !== this.#selected) this.#onSelect(nearest.number);
    };
    drawn.addEventListener("pointermove", pointAt);
    // A tap does not move.
    drawn.addEventListener("pointerdown", pointAt);
    return drawn;
  }

  /** @param {number} index @param {number} row @param {number} column */
  #distance(index, row, column) {
    const frame = this.#layout.windows[index]?.frame;
    return frame ? Math.abs(frame.top + 1 - row) + Math.abs(frame.left + 1 - column) : 0;
  }

  /** @param {number} hue */
  #drawKeys(hue) {
    const { rows, columns, keyRows, keyColumns, windows } = this.#layout;
    const width = (columns * UNIT) / keyColumns, height = (rows * UNIT) / keyRows;
    const drawn = svg("svg", { viewBox: this.viewBox, class: `keys m${hue}`, id: "keys", tabindex: 0, role: "slider",
      "aria-label": "Key and value", "aria-valuemin": 1, "aria-valuemax": windows.length, "aria-valuenow": 1 });
    this.#cells = windows.map((_, index) => {
      const cell = svg("rect", { x: (index % keyColumns) * width, y: Math.floor(index / keyColumns) * height, width, height, class: "cell" });
      cell.addEventListener("pointerenter", () => this.#onSelect(index));
      return cell;
    });
    drawn.append(...this.#cells, this.#mark);
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

  /** Give each key and value the mean colour of its patches. @param {string} url */
  async #paint(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const { rows, columns, windows } = this.#layout;
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: columns, height: rows });
    const context = canvas.getContext("2d");
    if (!context) return;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, columns, rows);
    const { data } = context.getImageData(0, 0, columns, rows);
    windows.forEach(({ patches }, index) => {
      const mean = [0, 1, 2].map((channel) => Math.round(patches.reduce((sum, patch) => sum + (data[4 * patch + channel] ?? 0), 0) / patches.length));
      this.#cells[index]?.setAttribute("fill", `rgb(${mean.join(" ")})`);
      this.#cells[index]?.classList.add("painted");
    });
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

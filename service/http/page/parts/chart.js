// uPlot, loaded when the first chart is shown, in the colours of the page.

/** @typedef {import("uplot")} Chart */
/** @typedef {import("uplot").Options} Options */
/** @typedef {import("uplot").AlignedData} Data */
/** @typedef {typeof import("uplot")} Library */

/** @type {Promise<Library> | null} */
let library = null;

/** @returns {Promise<Library>} */
function load() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "page/vendor/uPlot.iife.min.js";
    script.onload = () => resolve(/** @type {{uPlot: Library}} */ (/** @type {unknown} */ (globalThis)).uPlot);
    script.onerror = () => {
      library = null;
      script.remove();
      reject(new Error("the charts could not be loaded"));
    };
    document.head.append(script);
  });
  return library;
}

/** A colour of the page's style, as it is now. @param {string} name such as `--ink` */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/**
 * A chart that fills `place` and follows its width and the colour scheme. `alter` receives the options that all charts share.
 *
 * @param {HTMLElement} place
 * @param {Data} data
 * @param {(options: Options) => Options} alter
 * @param {number} [height]
 * @returns {Promise<Chart>}
 */
export async function chart(place, data, alter, height = 170) {
  const Library = await load();
  const made = new Library(alter({ width: Math.max(200, place.clientWidth), height, series: [], legend: { show: false }, cursor: { show: false } }), data, place);
  const resized = new ResizeObserver(() => {
    if (place.clientWidth && place.clientWidth !== made.width) made.setSize({ width: place.clientWidth, height });
  });
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const redraw = () => made.redraw();
  resized.observe(place);
  scheme.addEventListener("change", redraw);
  (made.hooks.destroy ??= []).push(() => {
    resized.disconnect();
    scheme.removeEventListener("change", redraw);
  });
  return made;
}

/** An axis in the page's colours. @param {Partial<import("uplot").Axis>} [more] @returns {import("uplot").Axis} */
export function axis(more = {}) {
  return {
    stroke: () => colour("--soft"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    size: 44,
    gap: 4,
    ...more,
  };
}

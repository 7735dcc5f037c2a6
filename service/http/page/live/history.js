// Five minutes of statuses, and the charts of them.

import { axis, chart, colour } from "../parts/chart.js";
import { ms } from "../parts/format.js";
import { hue } from "../parts/models.js";

/** @import {Model, Status} from "../types.js" */
/** @import {Chart, Data} from "../parts/chart.js" */

const SECONDS = 300;
const LEAST_SECONDS = 60;

/** A moment before now, in words. @param {number} seconds from now, 0 or less */
function ago(seconds) {
  if (seconds === 0) return "now";
  return seconds % 60 === 0 ? `−${-seconds / 60} min` : `−${-seconds} s`;
}

/** @typedef {{time: number, status: Status | null}} Entry */

export class History {
  #places;
  /** @type {Entry[]} */
  #entries = [];
  /** @type {Chart[]} */
  #charts = [];
  /** The models that have lines, in their order. */
  #names = "";
  #now = 0;

  /** @param {HTMLElement[]} places of the three charts */
  constructor(places) {
    this.#places = places;
  }

  /** Break the lines: there was a second without an answer. */
  gap() {
    const last = this.#entries.at(-1);
    if (last?.status) this.#entries.push({ time: last.time + 0.5, status: null });
  }

  /** @param {Status} status @param {Map<string, Model>} known */
  async add(status, known) {
    const last = this.#entries.at(-1);
    if (last && status.time - last.time > 3 && last.status) this.gap();
    this.#now = status.time;
    this.#entries.push({ time: status.time, status });
    this.#entries = this.#entries.filter((entry) => entry.time >= status.time - SECONDS);
    const names = this.#active();
    if (!this.#charts.length || names.join() !== this.#names) {
      this.#names = names.join();
      for (const old of this.#charts) old.destroy();
      this.#charts = await this.#make(names, known);
      return;
    }
    this.#series(names).forEach((data, index) => this.#charts[index]?.setData(data));
  }

  /** Models that answered something in these minutes; a line of zeros says nothing. */
  #active() {
    const names = new Set(this.#entries.flatMap(({ status }) => status?.models.filter((model) => model.images_per_s > 0).map((model) => model.name) ?? []));
    return [...names].sort();
  }

  /** @param {string[]} names @returns {Data[]} */
  #series(names) {
    const times = this.#entries.map(({ time }) => time - this.#now);
    const each = (/** @type {(status: Status) => number | null | undefined} */ value) => this.#entries.map(({ status }) => (status ? (value(status) ?? null) : null));
    const of = (/** @type {Status} */ status, /** @type {string} */ name) => status.models.find((model) => model.name === name);
    return [
      [times, ...names.map((name) => each((status) => of(status, name)?.images_per_s ?? 0))],
      [times, ...names.map((name) => each((status) => of(status, name)?.p95_ms))],
      [times, each((status) => status.queue.waiting)],
    ];
  }

  /** The charts begin with one minute and grow until they reach five minutes back. @returns {[number, number]} */
  #range() {
    const age = this.#now - (this.#entries[0]?.time ?? this.#now);
    return [-Math.min(SECONDS, Math.max(LEAST_SECONDS, 60 * Math.ceil(age / 60))), 0];
  }

  /** @param {string[]} names @param {Map<string, Model>} known */
  #make(names, known) {
    const lines = names.map((name) => {
      const model = known.get(name);
      const dash = model?.precision === "fp32" ? {} : { dash: [5, 3] };
      return { stroke: () => colour(`--m${hue(model)}`), width: 2, points: { show: false }, ...dash };
    });
    const waiting = [{ stroke: () => colour("--ink"), width: 2, points: { show: false } }];
    return Promise.all(this.#series(names).map((data, index) => {
      const place = this.#places[index];
      if (!place) throw new Error("a chart without a place");
      const least = index === 1 ? 10 : 5;
      return chart(place, data, (options) => ({
        ...options,
        series: [{}, ...(index === 2 ? waiting : lines)],
        scales: { x: { time: false, range: () => this.#range() }, y: { range: (_, __, most) => [0, Math.max(least, (most || 0) * 1.1)] } },
        axes: [
          axis({ size: 28, incrs: [15, 30, 60], values: (_, ticks) => ticks.map(ago) }),
          axis({ values: (_, ticks) => ticks.map((tick) => (index === 1 ? ms(tick).replace(".0", "") : String(tick))), size: 56 }),
        ],
      }));
    }));
  }
}

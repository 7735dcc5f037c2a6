// An open loop: pictures are due at a constant rate, whether or not the ones before were answered.

import { Problem, isCancelled, request } from "../parts/api.js";

export const SECONDS = 20;
export const MAX_RATE = 200;
/** Requests in progress at once: one fewer than browsers open to a host over HTTP/1.1, which leaves one for the plan. */
export const MAX_OPEN = 5;

/** @typedef {"family" | "fixed"} Arm */
/**
 * @typedef {object} Sample
 * @property {Arm} arm
 * @property {number} dueS since the start
 * @property {"answered" | "late" | "refused" | "failed"} outcome late: also if it was never sent, as no connection was free in time
 * @property {number} latencyMs from the moment it was due
 * @property {string | null} model that answered
 */

/**
 * @typedef {object} Options
 * @property {Blob} picture
 * @property {number} rate images per second
 * @property {number} deadlineMs
 * @property {Record<Arm, string>} names what each arm asks for
 * @property {(sample: Sample) => void} onSample
 * @property {(error: unknown) => void} onEnd error: what every further request would get too, or null
 */

/** The arm to which a second belongs. @param {number} seconds @returns {Arm} */
export function armAt(seconds) {
  return Math.floor(seconds) % 2 === 0 ? "family" : "fixed";
}

/** A load that runs until its time is over or it is stopped. */
export class Load {
  #options;
  #controller = new AbortController();
  #startedAt = performance.now();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #due = 0;
  /** @type {number[]} Due, and waiting for a free connection: the moments when they were due. */
  #waiting = [];
  #open = 0;
  running = true;

  /** @param {Options} options */
  constructor(options) {
    this.#options = options;
    this.#schedule();
  }

  /** Seconds since the start, at most the length of the load. */
  get seconds() {
    return Math.min(SECONDS, (performance.now() - this.#startedAt) / 1000);
  }

  /** End it now; requests in progress are cancelled and not counted. @param {unknown} [error] */
  stop(error = null) {
    if (!this.running) return;
    this.running = false;
    clearTimeout(this.#timer);
    this.#controller.abort();
    this.#options.onEnd(error);
  }

  #schedule() {
    const { rate } = this.#options;
    const total = rate * SECONDS;
    const elapsed = (performance.now() - this.#startedAt) / 1000;
    for (; this.#due < total && this.#due / rate <= elapsed; this.#due += 1) this.#waiting.push(this.#due / rate);
    this.#send();
    if (this.running && (this.#due < total || this.#waiting.length > 0)) {
      this.#timer = setTimeout(() => this.#schedule(), Math.max(1000 / MAX_RATE, 1000 * (this.#due / rate - elapsed)));
    }
  }

  /** Send what waits while connections are free. What has waited for longer than its deadline is late, and not sent. */
  #send() {
    const { rate, deadlineMs, onSample } = this.#options;
    for (let dueS; this.running && (dueS = this.#waiting[0]) !== undefined; this.#waiting.shift()) {
      const latencyMs = this.#sinceMs(dueS);
      if (latencyMs > deadlineMs - 1) onSample({ arm: armAt(dueS), dueS, outcome: "late", latencyMs, model: null });
      else if (this.#open < MAX_OPEN) void this.#ask(dueS, deadlineMs - latencyMs);
      else break;
    }
    if (this.running && this.#due >= rate * SECONDS && this.#open === 0 && this.#waiting.length === 0) {
      this.running = false;
      this.#options.onEnd(null);
    }
  }

  /** @param {number} dueS */
  #sinceMs(dueS) {
    return performance.now() - this.#startedAt - 1000 * dueS;
  }

  /** @param {number} dueS @param {number} leftMs of its deadline */
  async #ask(dueS, leftMs) {
    const { names, picture, deadlineMs, onSample } = this.#options;
    const arm = armAt(dueS);
    this.#open += 1;
    /** @type {Sample["outcome"]} */
    let outcome = "failed";
    let model = null;
    try {
      const query = `model=${encodeURIComponent(names[arm])}&deadline_ms=${leftMs.toFixed(1)}&top_k=1`;
      const response = await request(`v1/classify?${query}`, { method: "POST", body: picture, signal: this.#controller.signal });
      model = /** @type {{model: string}} */ (await response.json()).model;
      outcome = "answered";
    } catch (error) {
      if (isCancelled(error) || !this.running) return;
      if (error instanceof Problem) {
        if (error.status === 429 || error.status === 504) outcome = "refused";
        else if (error.status < 500) return this.stop(error);
      }
    } finally {
      this.#open -= 1;
    }
    const latencyMs = this.#sinceMs(dueS);
    if (outcome === "answered" && latencyMs > deadlineMs) outcome = "late";
    onSample({ arm, dueS, outcome, latencyMs, model });
    this.#send();
  }
}

/**
 * @typedef {object} Summary
 * @property {number} sent
 * @property {number} inTime
 * @property {number} late
 * @property {number} refused
 * @property {number} failed
 * @property {number} goodput answers in time per second of this arm
 * @property {number | null} top1 mean of the models that answered, late or not
 * @property {number | null} medianMs
 */

/**
 * @param {Sample[]} samples
 * @param {Arm} arm
 * @param {number} seconds that have passed
 * @param {(model: string) => number} top1Of
 * @returns {Summary}
 */
export function summary(samples, arm, seconds, top1Of) {
  const own = samples.filter((sample) => sample.arm === arm);
  const count = (/** @type {Sample["outcome"]} */ outcome) => own.filter((sample) => sample.outcome === outcome).length;
  const answered = own.filter((sample) => sample.model !== null);
  const top1s = answered.map((sample) => top1Of(sample.model ?? "")).filter((value) => value >= 0);
  const latencies = answered.map((sample) => sample.latencyMs).sort((one, other) => one - other);
  const whole = Math.floor(seconds / 2), rest = seconds % 2;
  const ownSeconds = whole + (arm === "family" ? Math.min(1, rest) : Math.max(0, rest - 1));
  return {
    sent: own.length,
    inTime: count("answered"),
    late: count("late"),
    refused: count("refused"),
    failed: count("failed"),
    goodput: ownSeconds ? count("answered") / ownSeconds : 0,
    top1: top1s.length ? top1s.reduce((sum, value) => sum + value, 0) / top1s.length : null,
    medianMs: latencies[Math.floor(latencies.length / 2)] ?? null,
  };
}

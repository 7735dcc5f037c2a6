// An open loop: pictures are sent when they are due, whether or not the ones before were answered.

import { Problem, isCancelled, request } from "../parts/api.js";

export const SECONDS = 20;
export const MAX_RATE = 200;

/** @typedef {"family" | "fixed"} Arm */
/**
 * @typedef {object} Sample
 * @property {Arm} arm
 * @property {number} dueS since the start
 * @property {"answered" | "late" | "refused" | "failed"} outcome
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
 * @property {() => void} onEnd
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
  #sent = 0;
  #open = 0;
  running = true;

  /** @param {Options} options */
  constructor(options) {
    this.#options = options;
    this.#send();
  }

  /** Seconds since the start, at most the length of the load. */
  get seconds() {
    return Math.min(SECONDS, (performance.now() - this.#startedAt) / 1000);
  }

  /** End it now; requests in progress are cancelled and not counted. */
  stop() {
    if (!this.running) return;
    this.running = false;
    clearTimeout(this.#timer);
    this.#controller.abort();
    this.#options.onEnd();
  }

  #send() {
    const { rate } = this.#options;
    const total = rate * SECONDS;
    const elapsed = (performance.now() - this.#startedAt) / 1000;
    while (this.#sent < total && this.#sent / rate <= elapsed) {
      void this.#ask(this.#sent / rate);
      this.#sent += 1;
    }
    if (this.#sent < total) {
      this.#timer = setTimeout(() => this.#send(), Math.max(0, 1000 * (this.#sent / rate - elapsed)));
    } else this.#finish();
  }

  #finish() {
    if (this.#sent >= this.#options.rate * SECONDS && this.#open === 0 && this.running) {
      this.running = false;
      this.#options.onEnd();
    }
  }

  /** @param {number} dueS */
  async #ask(dueS) {
    const { names, picture, deadlineMs, onSample } = this.#options;
    const arm = armAt(dueS);
    this.#open += 1;
    /** @type {Sample["outcome"]} */
    let outcome = "failed";
    let model = null;
    try {
      const query = `model=${encodeURIComponent(names[arm])}&deadline_ms=${deadlineMs}&top_k=1`;
      const response = await request(`v1/classify?${query}`, { method: "POST", body: picture, signal: this.#controller.signal });
      model = /** @type {{model: string}} */ (await response.json()).model;
      outcome = "answered";
    } catch (error) {
      if (isCancelled(error) || !this.running) return;
      if (error instanceof Problem && (error.status === 429 || error.status === 504)) outcome = "refused";
    } finally {
      this.#open -= 1;
    }
    const latencyMs = performance.now() - this.#startedAt - 1000 * dueS;
    if (outcome === "answered" && latencyMs > deadlineMs) outcome = "late";
    onSample({ arm, dueS, outcome, latencyMs, model });
    this.#finish();
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

// The JSON of /v1 as this page uses it. Only types: `tsc --checkJs` reads this file, browsers never load it.

/** @typedef {{variant: string, tokens: number, kv_tokens: number, stride: number | null, block_size: number | null, rank: number | null}} Attention */
/**
 * @typedef {object} Model
 * @property {string} name
 * @property {number | null} version
 * @property {string} state
 * @property {string} [reason]
 * @property {boolean} [default]
 * @property {string} [family]
 * @property {string} [architecture]
 * @property {string} [variant]
 * @property {number} [kv_tokens]
 * @property {number} [tokens]
 * @property {number} [params]
 * @property {number} [macs]
 * @property {string} [precision]
 * @property {number} [img_size]
 * @property {number} [num_classes]
 * @property {{dataset: string, split: string, n: number, top1: number, top5: number}} [accuracy]
 */
/** @typedef {{models: Model[], families: Record<string, string[]>}} ModelList */
/** @typedef {{name: string, architecture: string, attention: Attention | null, input: {shape: number[]}}} Manifest */
/** @typedef {{name: string, version: number, manifest: Manifest}} ModelDetail */

/** @typedef {{index: number, label: string, probability: number}} Prediction */
/** @typedef {{read: number, decode: number, queue: number, inference: number, total: number}} Timings */
/** @typedef {{type?: string, title: string, status: number, detail: string, code: string, retry_after_ms?: number}} ProblemMembers */
/** @typedef {{event: "picture", models: string[], width: number, height: number, png: string}} PictureEvent */
/** @typedef {{event: "answer", model: string, version: number, predictions: Prediction[], timings_ms: Timings}} AnswerEvent */
/** @typedef {{event: "error", model: string, problem: ProblemMembers}} ErrorEvent */
/** @typedef {{event: "end", request_id: string, agreement: {model: string, of: number, agree: number} | null}} EndEvent */
/** @typedef {PictureEvent | AnswerEvent | ErrorEvent | EndEvent} CompareEvent */

/**
 * @typedef {object} Rung
 * @property {string} model
 * @property {number} version
 * @property {string} precision
 * @property {number} top1
 * @property {number} predicted_ms
 * @property {number} queue_ms
 * @property {number} compute_ms
 * @property {boolean} in_time
 * @property {boolean} chosen
 * @property {"chosen" | "late" | "headroom" | "less_accurate" | "no_faster"} why
 */
/** @typedef {{family: string, deadline_ms: number, images: number, chosen: string, reason: string, allowed_ms: number, in_time: boolean, rungs: Rung[]}} Plan */

/**
 * @typedef {object} ModelStatus
 * @property {string} name
 * @property {number} version
 * @property {string} state
 * @property {number} images
 * @property {number} images_per_s
 * @property {number | null} p50_ms
 * @property {number | null} p95_ms
 * @property {number | null} p99_ms
 * @property {number} waiting
 * @property {number} [memory_mb]
 */
/**
 * @typedef {object} Rollout
 * @property {"shadow" | "canary"} kind
 * @property {string} primary
 * @property {string} candidate
 * @property {number} share
 * @property {string} state
 * @property {number} candidate_images
 * @property {number} compared
 * @property {number} agree
 * @property {number} fallbacks
 * @property {number} errors
 * @property {number | null} primary_ms
 * @property {number | null} candidate_ms
 */
/**
 * @typedef {object} Status
 * @property {number} time
 * @property {number} uptime_s
 * @property {boolean} ready
 * @property {number} images_per_s
 * @property {{waiting: number, limit: number}} queue
 * @property {number | null} drain_s
 * @property {number} window_s
 * @property {number} [models_left_out]
 * @property {ModelStatus[]} models
 * @property {Rollout[]} [rollouts]
 * @property {Record<string, number>} refusals
 * @property {Record<string, Record<string, number>>} choices
 * @property {number} memory_mb
 * @property {number} lanes
 * @property {number} threads
 * @property {string} device
 */

export {};

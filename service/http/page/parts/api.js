// Requests to the service. Paths are relative to the page, so that it works under any prefix.

import { askForKey, storedKey } from "./key.js";

/** @import {ProblemMembers} from "../types.js" */

/** A refusal of the service, in its own words. */
export class Problem extends Error {
  /** @param {ProblemMembers} members @param {number | null} retryAfterMs */
  constructor(members, retryAfterMs = members.retry_after_ms ?? null) {
    super(members.detail);
    this.status = members.status;
    this.code = members.code;
    this.retryAfterMs = retryAfterMs;
  }
}

/** No answer at all: the service is gone, or the network is. */
export class Unreachable extends Error {}

/** Whether an error says only that its request was cancelled. @param {unknown} error */
export function isCancelled(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

/**
 * The answer to a request. Asks for an API key where one is needed, and repeats the request with it.
 *
 * @param {string} path
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
export async function request(path, init = {}) {
  for (;;) {
    const key = storedKey();
    const response = await send(path, key === null ? init : { ...init, headers: { ...init.headers, "X-API-Key": key } });
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (problem.status !== 401) throw problem;
    await askForKey(key, init.signal ?? null);
  }
}

/** @param {string} path @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

/**
 * The values of a body with one JSON value per line, as they arrive.
 *
 * @param {Response} response
 * @returns {AsyncGenerator<any>}
 */
export async function* lines(response) {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await readFrom(reader);
    const parts = (rest + (value ?? "")).split("\n");
    rest = done ? "" : (parts.pop() ?? "");
    for (const part of parts) if (part.trim()) yield JSON.parse(part);
    if (done) return;
  }
}

/** @param {ReadableStreamDefaultReader<string>} reader */
async function readFrom(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (isCancelled(error)) throw error;
    throw new Unreachable("the service ended the answer before its end", { cause: error });
  }
}

/** @param {string} path @param {RequestInit} init */
async function send(path, init) {
  try {
    return await fetch(path, { cache: "no-store", ...init });
  } catch (error) {
    if (isCancelled(error)) throw error;
    throw new Unreachable("the service cannot be reached", { cause: error });
  }
}

/** @param {Response} response */
async function problemOf(response) {
  const seconds = Number(response.headers.get("Retry-After"));
  const retryAfterMs = seconds > 0 ? seconds * 1000 : null;
  try {
    const members = await response.json();
    if (typeof members.detail === "string") return new Problem(members, members.retry_after_ms ?? retryAfterMs);
  } catch (error) {
    if (isCancelled(error)) throw error;
    // A proxy in between answers with a page of its own.
  }
  const detail = `status ${response.status}, and no explanation`;
  return new Problem({ title: "", status: response.status, detail, code: "unknown" }, retryAfterMs);
}

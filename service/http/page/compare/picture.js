// The picture that all tabs are about: where it comes from, and how the models see it.

import { request } from "../parts/api.js";
import { h } from "../parts/dom.js";

/** @typedef {{file: Blob, name: string, sample: string | null}} Picture */

export const SAMPLES = [
  { name: "raccoon", title: "a raccoon" },
  { name: "rocket", title: "a rocket at launch" },
  { name: "grace_hopper", title: "a portrait of Grace Hopper" },
];

/** @type {Picture | null} */
let chosen = null;
/** As PNG in a data: URL, by model. @type {Map<string, {url: string, width: number, height: number}>} */
const seen = new Map();
/** @type {Set<() => void>} */
const listeners = new Set();

export const picture = () => chosen;
/** @param {string} model */
export const asSeenBy = (model) => seen.get(model) ?? null;

/** @param {() => void} listener */
export function onPicture(listener) {
  listeners.add(listener);
}

/** Choose a new picture, and forget how the models saw the one before. @param {Picture | null} picture */
export function choose(picture) {
  chosen = picture;
  seen.clear();
  tell();
}

/** @param {string[]} models @param {{url: string, width: number, height: number}} image */
export function remember(models, image) {
  for (const model of models) seen.set(model, image);
  tell();
}

function tell() {
  for (const listener of listeners) listener();
}

/** @param {string} name @returns {Promise<Picture>} */
export async function sample(name) {
  const response = await request(`page/samples/${encodeURIComponent(name)}.jpg`, { cache: "default" });
  return { file: await response.blob(), name: `${name}.jpg`, sample: name };
}

/**
 * Call `take` with every picture that is dropped on the page or pasted into it; with null for anything else.
 *
 * @param {(picture: Picture | null) => void} take
 */
export function listen(take) {
  let depth = 0;
  const over = (/** @type {boolean} */ on) => document.documentElement.classList.toggle("dropping", on);
  addEventListener("dragenter", (event) => {
    event.preventDefault();
    depth += 1;
    over(true);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    over(depth > 0);
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    over(false);
    const file = event.dataTransfer?.files[0];
    take(file ? { file, name: file.name, sample: null } : null);
  });
  addEventListener("paste", (event) => {
    // Text that is pasted into a field is not meant as a picture.
    if (event.target instanceof HTMLInputElement) return;
    const files = [...(event.clipboardData?.files ?? [])];
    const file = files.find((other) => other.type.startsWith("image/")) ?? files[0];
    take(file ? { file, name: file.name || "pasted.png", sample: null } : null);
  });
}

/**
 * A picture from the camera, in a dialog; null if the person changes their mind. Rejects without a camera.
 *
 * @returns {Promise<Picture | null>}
 */
export async function fromCamera() {
  if (!navigator.mediaDevices) throw new Error("browsers open the camera for https: and localhost only");
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).catch(() => {
    throw new Error("there is no camera, or it was not allowed");
  });
  const video = h("video", { autoplay: true, playsinline: true, muted: true, "aria-label": "what the camera sees" });
  video.muted = true;
  video.srcObject = stream;
  const dialog = h(
    "dialog",
    { class: "camera", "aria-label": "Camera" },
    video,
    h("form", { method: "dialog", class: "buttons" },
      h("button", { value: "take", class: "primary" }, "Take the picture"),
      h("button", { value: "" }, "Cancel")),
  );
  document.body.append(dialog);
  dialog.showModal();
  try {
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "take" || !video.videoWidth) return null;
    const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d")?.drawImage(video, 0, 0);
    const file = await new Promise((/** @type {(blob: Blob | null) => void} */ resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    return file && { file, name: "camera.jpg", sample: null };
  } finally {
    for (const track of stream.getTracks()) track.stop();
    dialog.remove();
  }
}

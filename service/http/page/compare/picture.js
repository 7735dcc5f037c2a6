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
/** The picture, unless no model could read it. */
export const readable = () => (seen.size ? chosen : null);
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
 * Call `take` with every picture that is dropped on the page or pasted into it, and `fail` if a drop holds none.
 *
 * @param {(picture: Picture) => void} take
 * @param {(error: Error) => void} fail
 */
export function listen(take, fail) {
  const over = (/** @type {boolean} */ on) => document.documentElement.classList.toggle("dropping", on);
  const hasFiles = (/** @type {DragEvent} */ event) => Boolean(event.dataTransfer?.types.includes("Files"));
  addEventListener("dragenter", (event) => over(hasFiles(event)));
  // Without a related target it has left the window.
  addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    over(false);
    if (!hasFiles(event)) return;
    event.preventDefault();
    const isFolder = [...(event.dataTransfer?.items ?? [])].every((item) => item.webkitGetAsEntry?.()?.isDirectory);
    const file = firstImage(event.dataTransfer);
    if (!file || isFolder) fail(new Error(isFolder ? "this is a folder: drop one picture" : "there is no file in it: drop a picture"));
    else take({ file, name: file.name, sample: null });
  });
  addEventListener("paste", (event) => {
    const file = firstImage(event.clipboardData);
    if (file) take({ file, name: file.name || "pasted.png", sample: null });
  });
}

/** The first file that says it is a picture, or else the first. @param {DataTransfer | null} transfer */
function firstImage(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => file.type.startsWith("image/")) ?? files[0];
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

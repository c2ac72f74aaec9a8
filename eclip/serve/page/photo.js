// Photos in: chosen, taken, dropped or pasted; made upright, and smaller where a camera's pixels would only cost time.
// The preview is a canvas: the server's policy shows pictures of its own alone, no blob: address.

import { byId } from "./dom.js";

const LONGEST = 2048; // pixels: several times what a model reads
const HEAVIEST = 3_000_000; // bytes that are sent as they came
const QUALITY = 0.9;

/** A photo {blob, name, width, height, bitmap} of a file. Throws an Error with a line for the reader. */
export async function readPhoto(file, name = file.name || "pasted picture") {
  if (file.type && !file.type.startsWith("image/")) throw new Error(`${name} is not a picture.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${name}: the browser cannot read this picture. JPEG, PNG and WebP work.`);
  }
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= HEAVIEST) return { blob: file, name, width: bitmap.width, height: bitmap.height, bitmap };
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // a JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
  if (!blob) throw new Error(`${name}: the browser could not make this picture smaller.`);
  const small = await createImageBitmap(canvas);
  return { blob, name, width: canvas.width, height: canvas.height, bitmap: small };
}

/** Draw a photo into the preview. */
export function showPhoto(photo) {
  const canvas = byId("preview");
  canvas.width = photo.width;
  canvas.height = photo.height;
  canvas.getContext("2d").drawImage(photo.bitmap, 0, 0);
  canvas.setAttribute("aria-label", photo.name);
  canvas.parentElement.style.setProperty("--ratio", photo.width / photo.height);
}

/** Call `take(file)` for each picture that the reader gives, by whatever way. */
export function onPhoto(take) {
  for (const id of ["file", "camera"]) {
    byId(id).addEventListener("change", (event) => {
      const [file] = event.target.files;
      if (file) take(file);
      event.target.value = ""; // the same file may be chosen again
    });
  }
  onDrop(take);
  addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (!file) return; // words go where the caret is
    event.preventDefault();
    take(file);
  });
}

function onDrop(take) {
  const veil = (shown) => document.body.classList.toggle("dropping", shown);
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    veil(true);
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) veil(false);
  });
  addEventListener("drop", (event) => {
    veil(false);
    if (!carriesFiles(event)) return;
    event.preventDefault(); // or the browser would leave the page and show the file
    const file = pictureIn(event.dataTransfer) ?? event.dataTransfer.files[0];
    if (file) take(file);
  });
}

const pictureIn = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));

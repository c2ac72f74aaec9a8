// The heat map over a hit's picture: where the query is in it. Shown while the pointer rests on the picture, while it
// has the keyboard's focus, or after a tap; asked of the server once for each query and hit.

import { isAbort, locate } from "./api.js";

const LINGER = 160; // milliseconds: a pointer that only passes by asks nothing
const KEPT = 200; // maps
const SIDE = 96; // pixels of the drawn map, which the browser stretches over the picture

/** Heat maps for the hits of one query after the other. */
export class HeatMaps {
  constructor() {
    this.start(null);
  }

  /** A new query: its maps are others. */
  start(query) {
    this.shown?.controller.abort();
    this.query = query;
    this.maps = new Map();
    this.shown = null;
  }

  /** Make a hit's picture (a button that holds a canvas) show its map. */
  attach(button, canvas, hit) {
    const show = (delay) => this.#show({ button, canvas, hit }, delay);
    const hide = () => this.#hide(button);
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(LINGER));
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && !button.matches(":focus-visible") && hide());
    button.addEventListener("focus", () => button.matches(":focus-visible") && show(LINGER));
    button.addEventListener("blur", hide);
    button.addEventListener("click", () => (this.shown?.button === button && button.dataset.heat === "on" ? hide() : show(0)));
  }

  #show(target, delay) {
    if (this.shown?.button === target.button && delay) return;
    if (this.shown) this.#hide(this.shown.button);
    const controller = new AbortController();
    const timer = setTimeout(() => this.#fetch(target, controller.signal), delay);
    this.shown = { ...target, controller, timer };
  }

  #hide(button) {
    button.dataset.heat = "";
    button.setAttribute("aria-pressed", "false");
    if (this.shown?.button !== button) return;
    clearTimeout(this.shown.timer);
    this.shown.controller.abort();
    this.shown = null;
  }

  async #fetch({ button, canvas, hit }, signal) {
    const { maps, query } = this;
    try {
      if (!maps.has(hit.id)) {
        button.dataset.heat = "asking";
        const answer = await locate(query, hit.id, signal);
        if (maps.size >= KEPT) maps.delete(maps.keys().next().value);
        maps.set(hit.id, answer);
      }
      if (signal.aborted) return;
      paint(canvas, maps.get(hit.id).map);
      button.dataset.heat = "on";
      button.setAttribute("aria-pressed", "true");
    } catch (error) {
      if (isAbort(error)) return;
      button.dataset.heat = "failed";
      button.title = `No heat map: ${error.message}`;
    }
  }
}

/** Draw a map (rows of numbers) into a canvas: smooth, brighter and less clear where the numbers are higher. */
export function paint(canvas, map) {
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(SIDE, SIDE);
  const values = stretched(smooth(map, SIDE));
  values.forEach((value, i) => picture.data.set(colour(value), 4 * i));
  context.putImageData(picture, 0, 0);
}

// To [0, 1], so that the picture's own highest place is seen: how much it matched is the score's matter.
function stretched(values) {
  const low = Math.min(...values);
  const range = Math.max(...values) - low;
  return values.map((value) => (range > 1e-6 ? (value - low) / range : 0));
}

// Cubic B-spline of a grid at `side` x `side` places: no corner of a patch is seen, and nothing swings over.
function smooth(map, side) {
  const across = map.map((row) => along(row, side));
  const columns = Array.from({ length: side }, (_, x) => along(across.map((row) => row[x]), side));
  const out = new Float32Array(side * side);
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) out[y * side + x] = columns[x][y];
  return out;
}

function along(values, side) {
  const last = values.length - 1;
  return Float32Array.from({ length: side }, (_, i) => {
    const at = ((i + 0.5) * values.length) / side - 0.5;
    const left = Math.floor(at);
    const t = at - left;
    const weights = [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3];
    return weights.reduce((sum, weight, k) => sum + weight * values[Math.min(Math.max(left + k - 1, 0), last)], 0) / 6;
  });
}

// Clear, violet, red, orange, yellow: stops of the colour's scale, with how much they cover (0 to 255).
const STOPS = [[60, 20, 120, 0], [90, 25, 140, 60], [190, 40, 100, 105], [245, 110, 30, 130], [255, 215, 80, 150]];

function colour(value) {
  const at = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const left = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[left].map((from, i) => Math.round(from + (at - left) * (STOPS[left + 1][i] - from)));
}

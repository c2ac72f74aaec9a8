// Drawing a box on the photo, by mouse, finger or keyboard. Boxes are [x0, y0, x1, y1] in pixels of the photo.
//
// Dragging on the photo draws a box, dragging a corner sizes it, dragging inside moves it. By keyboard Enter makes one,
// arrows move it, Shift and arrows size it, Delete or Escape clears it. `onSettled(box)` is called when it is done:
// at the end of a drag, or when the keys have rested.

import { announce, boxShape, describeBox, makeSvg } from "./dom.js";

const SMALLEST = 8; // pixels of the screen: less is a click
const GRIP = { mouse: 12, touch: 24, pen: 16 }; // pixels of the screen around a corner
const REST = 700; // milliseconds without a key until the box is searched
const STEP = 0.04; // of the photo's side, a press of an arrow key
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** The tool over a stage that holds the photo's canvas and an SVG over it. */
export class BoxTool {
  constructor(stage, overlay, onSettled) {
    Object.assign(this, { stage, overlay, onSettled, box: null, found: [], size: [1, 1], drag: null, resting: 0 });
    stage.addEventListener("pointerdown", (event) => this.#press(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    stage.addEventListener("pointerup", (event) => this.#release(event));
    stage.addEventListener("pointercancel", () => this.#cancel());
    stage.addEventListener("keydown", (event) => this.#key(event));
    stage.addEventListener("blur", () => this.resting && this.#settle());
  }

  /** Show a photo of this size with this box (or null). */
  show(width, height, box) {
    this.#forget();
    this.size = [width, height];
    this.found = [];
    this.box = box;
    this.#draw();
  }

  /** Regions that the server found in the photo, dashed. */
  showFound(boxes) {
    this.found = boxes;
    this.#draw();
  }

  /** Set the box and search with it. */
  choose(box) {
    this.box = box;
    this.#draw();
    this.#settle();
  }

  #press(event) {
    if (event.button !== 0 || this.drag) return;
    this.stage.setPointerCapture(event.pointerId);
    const at = this.#pointOf(event);
    const grip = this.#toPhoto(GRIP[event.pointerType] ?? GRIP.mouse);
    this.drag = { ...this.#grasp(at, grip), start: at, before: this.box };
    event.preventDefault(); // no selection, no drag of the picture
    this.stage.focus({ preventScroll: true, focusVisible: false });
  }

  // What a press at a point takes hold of: a corner (its opposite stays), the box, or nothing yet.
  #grasp([x, y], [gripX, gripY]) {
    if (!this.box) return { how: "new", anchor: [x, y] };
    const [x0, y0, x1, y1] = this.box;
    for (const [cornerX, farX] of [[x0, x1], [x1, x0]]) {
      for (const [cornerY, farY] of [[y0, y1], [y1, y0]]) {
        if (Math.abs(x - cornerX) <= gripX && Math.abs(y - cornerY) <= gripY) return { how: "size", anchor: [farX, farY] };
      }
    }
    if (x > x0 && x < x1 && y > y0 && y < y1) return { how: "move", anchor: [x, y] };
    return { how: "new", anchor: [x, y] };
  }

  #move(event) {
    const at = this.#pointOf(event);
    if (!this.drag) {
      this.#pointer(this.#grasp(at, this.#toPhoto(GRIP.mouse)).how);
      return;
    }
    const { how, anchor, before, start } = this.drag;
    if (how === "move") this.box = this.#shifted(before, at[0] - start[0], at[1] - start[1]);
    else this.box = ordered(anchor, at);
    this.#draw();
  }

  #release() {
    if (!this.drag) return;
    const { before } = this.drag;
    this.drag = null;
    const [leastX, leastY] = this.#toPhoto(SMALLEST);
    const tooSmall = this.box && (this.box[2] - this.box[0] < leastX || this.box[3] - this.box[1] < leastY);
    if (tooSmall) this.box = before;
    this.#draw();
    if (String(this.box) !== String(before)) this.#settle();
  }

  #cancel() {
    if (!this.drag) return;
    this.box = this.drag.before;
    this.drag = null;
    this.#draw();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && this.drag) this.#cancel();
    else if (["Delete", "Backspace", "Escape"].includes(event.key) && this.box) this.choose(null);
    else if (event.key === "Enter" || event.key === " ") this.#enter();
    else if (event.key in ARROWS) this.#arrow(...ARROWS[event.key], event.shiftKey);
    else return; // Tab goes on
    event.preventDefault();
  }

  #enter() {
    if (this.box) this.#settle();
    else this.#typed(this.#middle());
  }

  #arrow(right, down, sizing) {
    const [width, height] = this.size;
    const [dx, dy] = [right * STEP * width, down * STEP * height];
    if (!this.box) return this.#typed(this.#middle());
    if (!sizing) return this.#typed(this.#shifted(this.box, dx, dy));
    const [x0, y0, x1, y1] = this.box;
    const grown = [x0, y0, clamp(x1 + dx, x0 + STEP * width, width), clamp(y1 + dy, y0 + STEP * height, height)];
    return this.#typed(grown);
  }

  #typed(box) {
    this.box = box;
    this.#draw();
    announce(`Box ${describeBox(box, ...this.size)}`);
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.#settle(), REST);
  }

  #settle() {
    this.#forget();
    this.onSettled(this.box);
  }

  #forget() {
    clearTimeout(this.resting);
    this.resting = 0;
  }

  #middle() {
    const [width, height] = this.size;
    return [0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height];
  }

  #shifted([x0, y0, x1, y1], dx, dy) {
    const [width, height] = this.size;
    const [right, down] = [clamp(dx, -x0, width - x1), clamp(dy, -y0, height - y1)];
    return [x0 + right, y0 + down, x1 + right, y1 + down];
  }

  // Where an event is, in pixels of the photo; outside counts as its edge.
  #pointOf(event) {
    const rect = this.overlay.getBoundingClientRect();
    const [width, height] = this.size;
    const x = ((event.clientX - rect.left) / rect.width) * width;
    const y = ((event.clientY - rect.top) / rect.height) * height;
    return [clamp(x, 0, width), clamp(y, 0, height)];
  }

  // A length on the screen in pixels of the photo, across and down.
  #toPhoto(length) {
    const rect = this.overlay.getBoundingClientRect();
    return [(length * this.size[0]) / rect.width, (length * this.size[1]) / rect.height];
  }

  #pointer(how) {
    this.stage.dataset.grasp = how;
  }

  #draw() {
    const [width, height] = this.size;
    this.overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const shapes = this.box ? [] : this.found.map((box) => boxShape(box, "found"));
    if (this.box) shapes.push(shade(this.box, width, height), boxShape(this.box, "drawn"), ...corners(this.box));
    this.overlay.replaceChildren(...shapes);
    const where = this.box ? `Box ${describeBox(this.box, width, height)}` : "No box on the photo";
    this.stage.setAttribute("aria-label", where);
  }
}

const clamp = (number, low, high) => Math.min(Math.max(number, low), high);

const ordered = ([ax, ay], [bx, by]) => [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];

// The photo around the box, darker: what is not searched.
function shade([x0, y0, x1, y1], width, height) {
  const outer = `M0 0H${width}V${height}H0Z`;
  return makeSvg("path", { class: "shade", d: `${outer}M${x0} ${y0}V${y1}H${x1}V${y0}Z`, "fill-rule": "evenodd" });
}

// A line of no length with round ends is a dot whose size is the screen's, however large the photo is.
function corners([x0, y0, x1, y1]) {
  const points = [[x0, y0], [x1, y0], [x0, y1], [x1, y1]];
  return points.flatMap(([x, y]) =>
    ["corner halo", "corner"].map((name) => makeSvg("path", { class: name, d: `M${x} ${y}h0` })),
  );
}

// Making elements without markup: what a catalogue says is text, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** An element with attributes, `on...` listeners and children; strings become text nodes. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

let spoken = 0;

/** Tell a screen reader, without moving the focus. A repeated sentence is spoken again. */
export function announce(text) {
  clearTimeout(spoken);
  byId("live").textContent = "";
  spoken = setTimeout(() => (byId("live").textContent = text), 60);
}

/** "1 product", "12 products". */
export const counted = (number, one, many = `${one}s`) => `${number.toLocaleString()} ${number === 1 ? one : many}`;

/** The frame of a box on a picture of width x height: two rectangles, light around dark, seen on any picture. */
export function boxShape(box, kind = "match") {
  const [x0, y0, x1, y1] = box;
  const place = { x: x0, y: y0, width: Math.max(x1 - x0, 0), height: Math.max(y1 - y0, 0) };
  return makeSvg("g", { class: `box ${kind}` }, makeSvg("rect", { ...place, class: "halo" }), makeSvg("rect", place));
}

/** Where a box is, in words: "upper left, 20% of the picture". */
export function describeBox(box, width, height) {
  const [x0, y0, x1, y1] = box;
  const third = (middle, size, names) => names[Math.min(2, Math.max(0, Math.floor((3 * middle) / size)))];
  const vertical = third((y0 + y1) / 2, height, ["upper", "middle", "lower"]);
  const horizontal = third((x0 + x1) / 2, width, ["left", "centre", "right"]);
  const share = Math.round((100 * (x1 - x0) * (y1 - y0)) / (width * height));
  const place = vertical === "middle" && horizontal === "centre" ? "in the centre" : `${vertical} ${horizontal}`;
  return `${place}, ${share}% of the picture`;
}

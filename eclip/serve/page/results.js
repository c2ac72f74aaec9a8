// The results: a card a product, its picture with the matched region drawn, and the states that have no card.

import { boxShape, byId, counted, describeBox, make, makeSvg } from "./dom.js";

const FIRST_ROWS = 8; // pictures that are fetched at once; the others when they come near

/** A hit's card. `shown`: names of the attributes worth a line; `onSimilar(hit)`: search for what looks like it;
    `scoredBy`: what its score is. */
export function card(hit, { heat, shown, onSimilar, rank, scoredBy }) {
  const { id, title, width, height, box } = hit;
  const name = title || hit.product || id;
  const image = make("img", {
    src: hit.thumbnail,
    alt: "",
    width,
    height,
    decoding: "async",
    loading: rank < FIRST_ROWS ? "eager" : "lazy",
    draggable: "false",
  });
  image.addEventListener("error", () => picture.classList.add("broken"));
  const canvas = make("canvas", { class: "heat", "aria-hidden": "true" });
  const overlay = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, box ? boxShape(box) : null);
  const frame = make("span", { class: "frame" }, image, canvas, overlay);
  fit(frame, width, height);
  const matched = box ? `. Matched part: ${describeBox(box, width, height)}` : "";
  const label = `Heat map on ${name}${matched}`;
  const picture = make("button", { type: "button", class: "picture", "aria-label": label, "aria-pressed": "false" }, frame);
  heat.attach(picture, canvas, hit);
  return make(
    "li",
    { class: "card", "data-id": id, "data-product": hit.product },
    picture,
    make("h3", { title: name, dir: "auto" }, name),
    make("p", { class: "meta" }, describe(hit, shown)),
    footer(hit, name, onSimilar, scoredBy),
  );
}

function footer(hit, name, onSimilar, scoredBy) {
  const similar = make("button", { type: "button", class: "link", "aria-label": `More like ${name}`, onclick: () => onSimilar(hit) }, "More like this");
  const score = Number.isFinite(hit.score) ? make("span", { class: "score", title: `Score: ${scoredBy ?? "larger is better"}` }, make("span", { class: "hidden" }, "score "), hit.score.toFixed(2)) : null;
  const price = Number.isFinite(hit.price) ? make("span", { class: "price" }, hit.price.toLocaleString()) : null;
  return make("div", { class: "card-foot" }, price, similar, score);
}

/** A line of what a hit is: its category and some of its attributes. */
export function describe(hit, shown) {
  const values = shown.map((name) => hit.attributes?.[name]).filter((value) => ["string", "number"].includes(typeof value));
  return [...new Set([hit.category, ...values.map(String)])].filter(Boolean).join(" · ");
}

// As large as the square tile allows, with the picture's own sides.
function fit(frame, width, height) {
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.style[width >= height ? "width" : "height"] = "100%";
}

/** Grey cards while a first answer is awaited. */
export function skeletons(number) {
  const one = () => make("li", { class: "card skeleton", "aria-hidden": "true" }, make("span", { class: "picture" }), make("span", { class: "line" }), make("span", { class: "line short" }));
  return Array.from({ length: number }, one);
}

/** "6 products for “red sofa” and the box on your photo"; "The 24 closest ..." where there may be more. */
export function headline(query, number, limit) {
  const what = [];
  if (query.words) what.push(`“${query.words}”`);
  if (query.photo) what.push(query.box ? "the box on your photo" : "your photo");
  const found = number < limit ? counted(number, "product") : `The ${number} closest products`;
  return `${number ? found : "No product"} for ${what.join(" and ")}`;
}

/** A line above the results, with a way out: {text, detail, actions: [[label, function]], kind}. */
export function notice(content) {
  const place = byId("notice");
  place.hidden = !content;
  if (!content) return place.replaceChildren();
  place.dataset.kind = content.kind ?? "plain";
  const actions = (content.actions ?? []).map(([label, act]) => make("button", { type: "button", class: "button small", onclick: act }, label));
  return place.replaceChildren(
    make("p", {}, make("strong", {}, content.text), content.detail ? ` ${content.detail}` : null),
    actions.length ? make("div", { class: "row" }, ...actions) : null,
  );
}

// Filters of the catalogue: what /facets names, as lists and fields, and the ones in use as chips.

import { byId, counted, make } from "./dom.js";
import { filterCount, numberOf } from "./state.js";

const PLAIN = 6; // attributes that are seen at once
const WORDY = /^\p{L}[\p{L} -]{2,18}$/u; // values that read as words
const MEANS_LITTLE = /^(true|false|yes|no|none|other|unknown|misc.*)$/i;

/** The form of filters. `onChange(filters)` is called with {category, attributes, priceMin, priceMax, hybrid}. */
export class Filters {
  constructor(form, onChange) {
    Object.assign(this, { form, onChange, facets: null });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => onChange(this.read()));
  }

  /** Build the form from the catalogue's facets. */
  build(facets) {
    this.facets = facets;
    const lists = Object.entries(facets.attributes)
      .filter(([, values]) => values.length > 1)
      .map(([name, values]) => list(`attr:${name}`, nameOf(name), values.map(({ value, count }) => [value, count])));
    const categories = facets.categories.map(({ name, count }) => [name, count]);
    const parts = [];
    if (categories.length > 1) parts.push(list("category", "Category", categories));
    parts.push(...lists.slice(0, PLAIN));
    if (facets.price) parts.push(prices(facets.price));
    if (lists.length > PLAIN) {
      parts.push(make("details", { class: "further" }, make("summary", {}, "More filters"), ...lists.slice(PLAIN)));
    }
    parts.push(hybrid());
    this.form.replaceChildren(...parts);
    byId("filters").hidden = false;
  }

  /** What the form says. */
  read() {
    const given = new FormData(this.form);
    const attributes = {};
    for (const [name, value] of given) if (name.startsWith("attr:") && value) attributes[name.slice(5)] = value;
    let [priceMin, priceMax] = [numberOf(given.get("price_min")), numberOf(given.get("price_max"))];
    if (priceMin !== null && priceMax !== null && priceMin > priceMax) [priceMin, priceMax] = [priceMax, priceMin];
    return { category: given.get("category") ?? "", attributes, priceMin, priceMax, hybrid: given.has("hybrid") };
  }

  /** Make form and chips say what the query says. */
  show(query) {
    for (const field of this.form.elements) {
      if (field.name === "category") choose(field, query.category);
      else if (field.name.startsWith("attr:")) choose(field, query.attributes[field.name.slice(5)] ?? "");
      else if (field.name === "price_min") field.value = query.priceMin ?? "";
      else if (field.name === "price_max") field.value = query.priceMax ?? "";
      else if (field.name === "hybrid") field.checked = query.hybrid;
    }
    const count = filterCount(query);
    byId("filters-count").textContent = count || "";
    byId("filters-count").hidden = !count;
    byId("applied").replaceChildren(...this.#chips(query));
  }

  #chips(query) {
    const without = (change) => this.onChange({ ...query, attributes: { ...query.attributes }, ...change });
    const chips = [];
    if (query.category) chips.push(chip(query.category, () => without({ category: "" })));
    for (const [name, value] of Object.entries(query.attributes)) {
      const { [name]: _, ...others } = query.attributes;
      chips.push(chip(`${nameOf(name)}: ${value}`, () => without({ attributes: others })));
    }
    if (query.priceMin !== null) chips.push(chip(`from ${query.priceMin}`, () => without({ priceMin: null })));
    if (query.priceMax !== null) chips.push(chip(`up to ${query.priceMax}`, () => without({ priceMax: null })));
    return chips;
  }
}

/** A few words to start with: the commonest category, the commonest value of each attribute, the next ones. */
export function examples(facets, number = 8) {
  const lists = [facets.categories.map(({ name, count }) => ({ value: name, count })), ...Object.values(facets.attributes)]
    .filter((values) => values.length > 1 && values.some(({ count }) => count > 1))
    .map((values) => values.map(({ value }) => value).filter((value) => WORDY.test(value) && !MEANS_LITTLE.test(value)));
  const turns = Array.from({ length: number }, (_, turn) => lists.map((values) => values[turn])).flat();
  return [...new Set(turns)].filter(Boolean).slice(0, number);
}

/** An attribute's name for readers: "unseen_type" is "Unseen type". */
export function nameOf(attribute) {
  const words = attribute.replaceAll("_", " ").trim();
  return words.charAt(0).toUpperCase() + words.slice(1);
}

function list(name, label, values) {
  const options = values.map(([value, count]) => make("option", { value }, `${value} (${count.toLocaleString()})`));
  return make("label", { class: "field" }, make("span", {}, label), make("select", { name }, make("option", { value: "" }, "Any"), ...options));
}

// A value that the catalogue does not have came with the address: it is shown, or it would filter unseen.
function choose(field, value) {
  if (value && ![...field.options].some((option) => option.value === value)) field.append(make("option", { value }, value));
  field.value = value;
}

function prices({ min, max }) {
  const field = (name, label, value) =>
    make("label", {}, make("span", { class: "hidden" }, label), make("input", { name, type: "number", min: 0, step: "any", inputmode: "decimal", placeholder: value }));
  const row = make("div", { class: "range" }, field("price_min", "Lowest price", Math.floor(min)), make("span", { "aria-hidden": "true" }, "–"), field("price_max", "Highest price", Math.ceil(max)));
  return make("fieldset", { class: "field" }, make("legend", {}, "Price"), row);
}

function hybrid() {
  const box = make("input", { name: "hybrid", type: "checkbox" });
  return make("label", { class: "check" }, box, make("span", {}, "Also look for the words in titles"));
}

function chip(text, remove) {
  const cross = make("span", { "aria-hidden": "true" }, "×");
  return make("li", {}, make("button", { type: "button", class: "chip on", "aria-label": `Remove filter ${text}`, onclick: remove }, text, cross));
}

/** "1,360 pictures of 34 products". */
export const sizeOf = (facets) => `${counted(facets.rows, "picture")} of ${counted(facets.products, "product")}`;

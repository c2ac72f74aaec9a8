// The page: a query (words, a photo, a box on it, filters) to results, and every way between them.
//
//   state.js    the query, and how it stands in the address
//   photo.js    photos in: chosen, taken, dropped, pasted        box.js      drawing a box on one
//   filters.js  what /facets offers                              results.js  cards, and the states without cards
//   heat.js     heat maps over the cards                         api.js      the server; dom.js  elements

import { facets as askFacets, isAbort, search as askSearch } from "./api.js";
import { BoxTool } from "./box.js";
import { announce, byId, make } from "./dom.js";
import { Filters, examples, sizeOf } from "./filters.js";
import { HeatMaps } from "./heat.js";
import { onPhoto, readPhoto, showPhoto } from "./photo.js";
import { card, describe, headline, notice, skeletons } from "./results.js";
import { emptyQuery, filterCount, isAsking, readAddress, writeAddress } from "./state.js";

const PAGE = 24; // results at first, and more at a press
const MOST = 96;
const SLOW = 4000; // milliseconds until the page says that it still waits
const BRIEF = 150; // milliseconds that nobody sees as waiting

let query = emptyQuery();
let limit = PAGE;
let catalogue = null;
let shownHits = [];
let running = null; // the AbortController of the search that is under way
const heat = new HeatMaps();
const tool = new BoxTool(byId("stage"), byId("overlay"), (box) => change({ box }));
const filters = new Filters(byId("filter-form"), ({ category, attributes, priceMin, priceMax, hybrid }) =>
  change({ category, attributes, priceMin, priceMax, hybrid }),
);

/** Change the query, put it into the address, and search. */
function change(part) {
  query = { ...query, ...part };
  writeAddress(query);
  show();
}

/** Make the page say what the query says, and search if it asks something. */
function show() {
  limit = PAGE;
  byId("words").value = query.words;
  filters.show(query);
  showQueryPhoto();
  document.title = query.words ? `${query.words} – Product search` : "Product search";
  if (isAsking(query)) run();
  else showStart();
}

function showQueryPhoto() {
  const { photo, box } = query;
  byId("photo").hidden = !photo;
  if (photo) {
    showPhoto(photo);
    tool.show(photo.width, photo.height, box);
  }
  byId("box-clear").hidden = !box;
  byId("box-found").hidden = true;
}

function showStart() {
  running?.abort();
  heat.start(null);
  document.body.dataset.state = "start";
  byId("hits").replaceChildren();
  byId("more").hidden = true;
  byId("headline").textContent = "Find a product";
  byId("subline").textContent = catalogue ? sizeOf(catalogue) : "";
  const waiting = filterCount(query) ? { text: "Filters are set.", detail: "Add words or a photo to search with them." } : null;
  notice(waiting);
}

/** Search; an answer that came too late for its query is thrown away. */
async function run({ more = false } = {}) {
  running?.abort();
  const mine = (running = new AbortController());
  const asked = query;
  const began = performance.now();
  const waiting = wait(more);
  try {
    const answer = await askSearch(asked, limit, mine.signal);
    if (mine.signal.aborted) return;
    showAnswer(asked, answer, performance.now() - began, more);
  } catch (error) {
    if (isAbort(error) || mine.signal.aborted) return;
    showFailure(error);
  } finally {
    waiting.forEach(clearTimeout);
    if (running === mine) {
      running = null;
      byId("results").setAttribute("aria-busy", "false");
      document.body.classList.remove("searching");
    }
  }
}

// What is seen while an answer is awaited; returns the timers.
function wait(more) {
  byId("results").setAttribute("aria-busy", "true");
  const begin = setTimeout(() => {
    document.body.classList.add("searching");
    if (document.body.dataset.state === "results" || more) return;
    document.body.dataset.state = "waiting";
    byId("headline").textContent = "Searching";
    byId("subline").textContent = "";
    notice(null);
    byId("hits").replaceChildren(...skeletons(8));
  }, BRIEF);
  const slow = setTimeout(() => {
    notice({ text: "Still searching.", detail: "The server takes its time." });
    announce("Still searching");
  }, SLOW);
  return [begin, slow];
}

function showAnswer(asked, answer, milliseconds, more) {
  const { hits, photo, scored_by: scoredBy } = answer;
  document.body.dataset.state = "results";
  heat.start(asked);
  const given = { heat, shown: attributesShown(), onSimilar: searchSimilar, scoredBy };
  const cards = hits.map((hit, rank) => card(hit, { ...given, rank }));
  shownHits = hits;
  const kept = more ? byId("hits").children.length : 0;
  byId("hits").replaceChildren(...cards);
  if (kept) cards[kept]?.querySelector("button").focus();
  const line = headline(asked, hits.length, limit);
  byId("headline").textContent = line;
  byId("subline").textContent = hits.length ? `${(milliseconds / 1000).toFixed(2)} s` : "";
  byId("more").hidden = hits.length < limit || limit >= MOST;
  notice(hits.length ? null : nothingFound(asked));
  announce(line);
  showFound(asked, photo);
}

const attributesShown = () => (catalogue ? Object.keys(catalogue.attributes).slice(0, 3) : []);

// The catalogue's attributes may come after a first answer.
function describeCards() {
  const lines = byId("hits").querySelectorAll(".meta");
  lines.forEach((line, i) => (line.textContent = describe(shownHits[i], attributesShown())));
}

const withoutFilters = ["Clear the filters", () => change({ category: "", attributes: {}, priceMin: null, priceMax: null })];

function nothingFound(asked) {
  if (!filterCount(asked)) return { text: "Nothing matches.", detail: "Try other words, or a photo." };
  return { text: "Nothing passes these filters.", actions: [withoutFilters] };
}

// Words with a photo say which thing in it is meant: where the model sees it.
function showFound(asked, photo) {
  const found = asked.photo && !asked.box ? (photo?.regions ?? []).slice(0, 1).map(({ box }) => box) : [];
  tool.showFound(found);
  byId("box-found").hidden = !found.length;
  byId("box-found").onclick = () => tool.choose(found[0]);
}

function showFailure(error) {
  document.body.dataset.state = "failed";
  heat.start(null);
  byId("hits").replaceChildren();
  byId("more").hidden = true;
  byId("headline").textContent = "No answer";
  byId("subline").textContent = "";
  const ways = [["Try again", () => start(true)]];
  if (error.status === 422 && filterCount(query)) ways.push(withoutFilters);
  notice({ kind: "error", text: error.message, actions: ways });
  announce(`No answer. ${error.message}`);
}

async function takePhoto(file) {
  try {
    const photo = await readPhoto(file);
    change({ photo, box: null });
  } catch (error) {
    notice({ kind: "error", text: error.message });
    announce(error.message);
  }
}

// A hit as the question: its picture, and the part of it that matched.
async function searchSimilar(hit) {
  try {
    const response = await fetch(hit.thumbnail);
    if (!response.ok) throw new Error("That picture cannot be had from the server any more.");
    const photo = await readPhoto(await response.blob(), hit.title || hit.id);
    const scale = [photo.width / hit.width, photo.height / hit.height];
    const box = hit.box?.map((number, i) => number * scale[i % 2]) ?? null;
    change({ photo, box, words: "" });
    scrollTo({ top: 0 });
    byId("stage").focus({ preventScroll: true, focusVisible: false });
  } catch (error) {
    notice({ kind: "error", text: error.message });
    announce(error.message);
  }
}

function showExamples() {
  const chips = examples(catalogue).map((words) =>
    make("li", {}, make("button", { type: "button", class: "chip", onclick: () => change({ words }) }, words)),
  );
  byId("examples").replaceChildren(...chips);
  byId("examples-part").hidden = !chips.length;
}

/** Ask what the catalogue offers, then show the query; `again` after a failure. */
async function start(again = false) {
  if (again) notice(null);
  const asking = isAsking(query) || isAsking(readAddress());
  if (!again) query = readAddress();
  if (asking) show();
  if (catalogue) return;
  try {
    catalogue = await askFacets();
    filters.build(catalogue);
    filters.show(query);
    showExamples();
    describeCards();
    if (!isAsking(query)) showStart();
  } catch (error) {
    if (!asking) showFailure(error);
  }
}

function listen() {
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    change({ words: byId("words").value.trim() });
  });
  byId("home").addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    change(emptyQuery());
    byId("words").focus();
  });
  byId("photo-remove").addEventListener("click", () => {
    change({ photo: null, box: null });
    byId("words").focus();
  });
  byId("box-clear").addEventListener("click", () => {
    tool.choose(null);
    byId("stage").focus();
  });
  byId("more").addEventListener("click", () => {
    limit = Math.min(MOST, limit + PAGE);
    run({ more: true });
  });
  addEventListener("popstate", () => {
    query = readAddress();
    show();
  });
  onPhoto((file) => takePhoto(file));
  const wide = matchMedia("(min-width: 900px)");
  const fit = () => {
    byId("filters").open = wide.matches;
    byId("words").placeholder = wide.matches ? "Describe it, or drop a photo" : "Describe it";
  };
  wide.addEventListener("change", fit);
  fit();
}

listen();
start();

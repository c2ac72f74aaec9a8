// A query, and how it stands in the address: ?q=red+sofa&category=Office&attr=colour%3Dred&min=10&max=90&hybrid=1.
// A photo has no place in an address; it is kept in memory for as long as the tab lives, so that Back finds it again.

const photos = new Map();
const KEPT = 20;
let nextPhoto = 1;

/** Nothing asked. */
export const emptyQuery = () => ({
  words: "",
  photo: null,
  box: null,
  category: "",
  attributes: {},
  priceMin: null,
  priceMax: null,
  hybrid: false,
});

/** Whether there is something to search for. */
export const isAsking = (query) => Boolean(query.words || query.photo);

/** How many filters are set. */
export const filterCount = (query) =>
  Number(Boolean(query.category)) +
  Object.keys(query.attributes).length +
  Number(query.priceMin !== null) +
  Number(query.priceMax !== null);

/** The query that the address and the history's entry say. */
export function readAddress(address = location.search, entry = history.state) {
  const query = emptyQuery();
  const given = new URLSearchParams(address);
  query.words = (given.get("q") ?? "").trim();
  query.category = given.get("category") ?? "";
  for (const pair of given.getAll("attr")) {
    const cut = pair.indexOf("=");
    if (cut > 0) query.attributes[pair.slice(0, cut)] = pair.slice(cut + 1);
  }
  query.priceMin = numberOf(given.get("min"));
  query.priceMax = numberOf(given.get("max"));
  query.hybrid = given.get("hybrid") === "1";
  query.photo = photos.get(entry?.photo) ?? null;
  query.box = query.photo ? entry?.box ?? null : null;
  return query;
}

/** A field's number, or null where there is none. */
export function numberOf(text) {
  const number = text === null || text.trim() === "" ? NaN : Number(text);
  return Number.isFinite(number) ? number : null;
}

/** The address of a query. */
export function addressOf(query) {
  const out = new URLSearchParams();
  if (query.words) out.set("q", query.words);
  if (query.category) out.set("category", query.category);
  for (const [name, value] of Object.entries(query.attributes)) out.append("attr", `${name}=${value}`);
  if (query.priceMin !== null) out.set("min", query.priceMin);
  if (query.priceMax !== null) out.set("max", query.priceMax);
  if (query.hybrid) out.set("hybrid", "1");
  const text = out.toString();
  return text ? `/?${text}` : "/";
}

/** Put a query into the address: a new entry of the history when it differs from the present one. */
export function writeAddress(query) {
  const entry = { photo: query.photo ? keep(query.photo) : null, box: query.box };
  const address = addressOf(query);
  const same = address === location.pathname + location.search && JSON.stringify(entry) === JSON.stringify(history.state);
  if (!same) history.pushState(entry, "", address);
}

function keep(photo) {
  photo.number ??= nextPhoto++;
  photos.set(photo.number, photo);
  if (photos.size > KEPT) photos.delete(photos.keys().next().value);
  return photo.number;
}

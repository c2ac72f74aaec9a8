// The server's answers, or one line that says why there is none.

const PATIENCE = 60_000; // milliseconds until an answer is given up

/** What went wrong, in a line for the reader; `gone` when nothing answered. */
export class Failure extends Error {
  constructor(line, { status = 0, gone = false } = {}) {
    super(line);
    this.status = status;
    this.gone = gone;
  }
}

/** Whether this is an answer that nobody waits for any more. */
export const isAbort = (error) => error?.name === "AbortError";

async function ask(path, options = {}, signal = undefined) {
  const patience = AbortSignal.timeout(PATIENCE);
  const either = signal ? AbortSignal.any([signal, patience]) : patience;
  let response, body;
  try {
    response = await fetch(path, { ...options, signal: either, headers: { Accept: "application/json", ...options.headers } });
    body = await response.text();
  } catch (error) {
    if (signal?.aborted) throw new DOMException("superseded", "AbortError");
    if (patience.aborted) throw new Failure(`The server has not answered for ${PATIENCE / 1000} seconds.`, { gone: true });
    throw new Failure("The server cannot be reached. Is it still running?", { gone: true });
  }
  const answer = parsed(body);
  if (!response.ok) throw new Failure(lineOf(answer, response), { status: response.status });
  if (answer === null) throw new Failure("The server's answer is not what this page understands.");
  return answer;
}

function parsed(body) {
  try {
    return JSON.parse(body);
  } catch {
    return null;
  }
}

function lineOf(answer, response) {
  if (typeof answer?.error === "string" && answer.error) return answer.error;
  return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
}

/** Categories, attributes and prices of the catalogue. */
export const facets = () => ask("/facets");

/** Search by words, photo, box and filters. */
export function search(query, limit, signal) {
  const form = new FormData();
  if (query.words) form.set("words", query.words);
  if (query.photo) {
    form.set("photo", query.photo.blob, query.photo.name);
    if (query.box) form.set("box", query.box.map((number) => Math.round(number)).join(","));
  }
  if (query.category) form.set("category", query.category);
  for (const [name, value] of Object.entries(query.attributes)) form.append("attribute", `${name}=${value}`);
  if (query.priceMin !== null) form.set("price_min", query.priceMin);
  if (query.priceMax !== null) form.set("price_max", query.priceMax);
  if (query.hybrid && query.words) form.set("hybrid", "true");
  form.set("limit", limit);
  return ask("/search", { method: "POST", body: form }, signal);
}

/** Where in a hit's picture the query is. Words say it where there are words; else the photo, or its box. */
export function locate(query, id, signal) {
  if (query.words) {
    const body = JSON.stringify({ id, words: query.words });
    return ask("/locate", { method: "POST", body, headers: { "Content-Type": "application/json" } }, signal);
  }
  const form = new FormData();
  form.set("id", id);
  form.set("exemplar", query.photo.blob, query.photo.name);
  if (query.box) form.set("box", query.box.map((number) => Math.round(number)).join(","));
  return ask("/locate", { method: "POST", body: form }, signal);
}

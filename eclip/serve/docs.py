"""What the routes take and give: as OpenAPI, and as a page of plain HTML that needs no script and no network."""

import json
from html import escape
from typing import Any

from eclip import __version__
from eclip.serve.limits import Limits

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-size: 14px; } pre { overflow-x: auto; padding: .75rem; border: 1px solid #8884; border-radius: 6px; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; }
:root { color-scheme: light dark; }
"""


def _value(kind: str | list[str], told: str = "", **more: Any) -> dict[str, Any]:
    return {"type": kind, **({"description": told} if told else {}), **more}


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields}


def _list(of: dict[str, Any], told: str = "") -> dict[str, Any]:
    return _value("array", told, items=of)


_NUMBER, _TEXT = _value("number"), _value("string")
_FILE = _value("string", "an image file; base64 in JSON", format="binary")
_BOX = _list(_NUMBER, "x0, y0, x1, y1 in pixels of width x height")
_REGION = _object({"box": _BOX, "score": _value("number", "its share of the map above the threshold")})
_ERROR = _object({"error": _value("string", "one line")})
_COUNT = _value("integer", "products")
_HIT = _object(
    {
        "id": _value("string", "of the image"),
        "product": _TEXT,
        "title": _TEXT,
        "category": _TEXT,
        "attributes": _value("object"),
        "price": _value(["number", "null"]),
        "score": _value("number", "larger is better"),
        "source": _value("string", "customer, detail, ..."),
        "width": _value("integer"),
        "height": _value("integer"),
        "box": {**_BOX, "description": "the region that matched, or null; pixels of width x height"},
        "thumbnail": _value("string", "where its JPEG is"),
    }
)


def _inputs(limits: Limits) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of each POST route: what it does, what it takes, what it gives."""
    search = {
        "words": _value("string", f"at most {limits.characters} characters"),
        "photo": _FILE,
        "box": _value("string", "x0,y0,x1,y1 in pixels of the photo: the part that is meant"),
        "category": _TEXT,
        "source": _value("string", "only pictures of this kind: detail, customer, ..."),
        "attribute": _list(_value("string", "name=value"), "given once for each attribute"),
        "price_min": _NUMBER,
        "price_max": _NUMBER,
        "limit": _value("integer", f"hits, 1 to {limits.hits}", default=10),
        "hybrid": _value("boolean", "the words by full text on titles, too", default=False),
        "rerank": _value("integer", f"0, or of limit to {limits.rerank} first hits, by the matching head", default=0),
        "fold": _value("boolean", "a product once, by its best image", default=True),
        "locate": _value("boolean", f"look for the words in every picture that is shown, of at most {limits.located}"),
    }
    answer = {
        "hits": _list(_HIT),
        "scored_by": _TEXT,
        "photo": _object({"width": _value("integer"), "height": _value("integer"), "regions": _list(_REGION)}),
        "seconds": _value("object", "where the time went"),
    }
    locate = {
        "id": _value("string", "of an image of the index; or"),
        "photo": _FILE,
        "words": _value("string", "what is looked for; or"),
        "exemplar": _FILE,
        "box": _value("string", "the part of the exemplar that is meant"),
        "limit": _value("integer", "regions, 1 to 20", default=5),
    }
    located = {
        "width": _value("integer"),
        "height": _value("integer"),
        "grid": _value("integer", "g, patches along a side"),
        "map": _list(_list(_NUMBER), "g x g in [0, 1], from the top left"),
        "regions": _list(_REGION),
    }
    embed = {
        "texts": _list(_TEXT, f"at most {limits.texts}; or"),
        "photos": _list(_FILE, f"at most {limits.photos}"),
        "prompts": _list(_TEXT, "one for each photo: what of it is meant"),
    }
    vectors = {"vectors": _list(_list(_NUMBER), "of unit length"), "embed_dim": _value("integer")}
    return {
        "/search": ("Search by words, by a photo or a box of it, or by both", search, answer),
        "/locate": ("Where in a picture is what words or an exemplar name", locate, located),
        "/embed": ("Vectors of texts or photos", embed, vectors),
    }


_NAMED = _object({"name": _TEXT, "count": _COUNT})
_FACET = _list(_object({"value": _TEXT, "count": _COUNT}))
_GETS: dict[str, tuple[str, dict[str, Any]]] = {
    "/healthz": (
        "Whether the server answers",
        {"status": _TEXT, "rows": _value("integer", "images"), "products": _value("integer"), "model": _TEXT},
    ),
    "/facets": (
        "What can be filtered by",
        {
            "rows": _value("integer", "images"),
            "products": _value("integer"),
            "categories": _list(_NAMED),
            "sources": _list(_NAMED),
            "attributes": _value("object", "name to values", additionalProperties=_FACET),
            "price": _object({"min": _NUMBER, "max": _NUMBER}),
        },
    ),
}


def describe(limits: Limits) -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, Any] = {}
    for path, (told, takes, gives) in _inputs(limits).items():
        body = {"schema": _object(takes)}
        content = {"multipart/form-data": body, "application/json": body}
        paths[path] = {"post": _operation(path, told, gives, requestBody={"required": True, "content": content})}
    for path, (told, gives) in _GETS.items():
        paths[path] = {"get": _operation(path, told, gives)}
    where = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
    thumbnail = _operation("/thumbnails", "A picture of the index, small", {}, parameters=[where])
    thumbnail["responses"]["200"]["content"] = {"image/jpeg": {}}
    paths["/thumbnails/{id}"] = {"get": thumbnail}
    info = {"title": "ECLIP search", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def _operation(path: str, told: str, gives: dict[str, Any], **more: Any) -> dict[str, Any]:
    good = {"description": "OK", "content": {"application/json": {"schema": _object(gives)}}}
    bad = {
        "description": "400, 403, 404, 405, 408, 413, 415, 422: what was sent; 503: too much to do, with Retry-After; "
        "504: no answer in time; 500: an error of the server's",
        "content": {"application/json": {"schema": _ERROR}},
    }
    name = path.strip("/")
    return {"operationId": name, "summary": told, **more, "responses": {"200": good, "default": bad}}


def page(document: dict[str, Any]) -> str:
    """The document for a reader."""
    parts = [f"<h1>{escape(document['info']['title'])}</h1>", '<p>As OpenAPI: <a href="/openapi.json">openapi.json</a>']
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(told['summary'])}")
            if "requestBody" in told:
                content = told["requestBody"]["content"]
                parts.append(f"<p>Takes {' or '.join(content)}:" + _table(next(iter(content.values()))["schema"]))
            content = told["responses"]["200"]["content"]
            if schema := content.get("application/json", {}).get("schema"):
                parts.append("<p>Gives:<pre>" + escape(json.dumps(_example(schema), indent=1)) + "</pre>")
            else:
                parts.append(f"<p>Gives {' '.join(content)}.")
    head = '<meta charset="utf-8"><title>ECLIP search: API</title><link rel="stylesheet" href="/docs.css">'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _table(schema: dict[str, Any]) -> str:
    rows = (
        f"<tr><th><code>{escape(name)}</code><td>{told['type']}<td>{escape(told.get('description', ''))}"
        for name, told in schema["properties"].items()
    )
    return f"<table>{''.join(rows)}</table>"


def _example(schema: dict[str, Any]) -> Any:
    """The form of an answer: values are what they are."""
    if schema["type"] == "object" and "properties" in schema:
        return {name: _example(told) for name, told in schema["properties"].items()}
    if schema["type"] == "array" and schema["items"]["type"] in ("object", "array"):
        return [_example(schema["items"])]
    return schema.get("description") or schema["type"]

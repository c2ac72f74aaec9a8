"""`create_app`: the routes of the search page and its API, over a `Service`."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from eclip.serve.answers import answer_json, located_json, vectors_json
from eclip.serve.asked import read_place, read_query
from eclip.serve.docs import STYLE, describe, page
from eclip.serve.forms import read_fields
from eclip.serve.guard import Guard
from eclip.serve.limits import Refusal
from eclip.serve.service import Service

PAGE = Path(__file__).parent / "page"
REGIONS = 5


def create_app(service: Service, *, hosts: Collection[str] | None) -> Any:
    """An ASGI application (FastAPI) over a service, which its owner closes.

    hosts: names in the Host header that are answered; None: all of them.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException

    limits = service.limits
    app = FastAPI(title="ECLIP search", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(partial(Guard, limits=limits, hosts=hosts))

    @app.exception_handler(HTTPException)
    def told(_: Request, error: HTTPException) -> JSONResponse:
        message = {404: "no such page", 405: "this method is not answered here"}.get(error.status_code)
        return JSONResponse({"error": message or str(error.detail)}, error.status_code, error.headers)

    @app.post("/search")
    async def search(request: Request) -> JSONResponse:
        query = read_query(await read_fields(request, limits), limits)
        return JSONResponse(answer_json(await service.search(query)))

    @app.post("/locate")
    async def locate(request: Request) -> JSONResponse:
        fields = await read_fields(request, limits)
        place, most = read_place(fields), fields.integer("limit", REGIONS, 1, 20)
        return JSONResponse(located_json(await service.locate(place, most)))

    @app.post("/embed")
    async def embed(request: Request) -> JSONResponse:
        fields = await read_fields(request, limits)
        fields.only(("texts", "photos", "prompts"))
        texts, prompts = fields.texts("texts", limits.texts), fields.texts("prompts", limits.photos)
        photos = fields.photos("photos", limits.photos)
        _check_embed(texts, photos, prompts)
        if texts:
            return JSONResponse(vectors_json(await service.embed_texts(texts)))
        with_decoder = service.model.encoder.has_decoder
        if prompts and not with_decoder:
            raise Refusal(422, "prompts: this model was trained without the instance decoder; leave them out")
        return JSONResponse(vectors_json(await service.embed_photos(photos, prompts)))

    @app.api_route("/healthz", methods=["GET", "HEAD"])  # monitors ask by HEAD
    async def healthz() -> JSONResponse:
        return JSONResponse(service.health())

    @app.get("/facets")
    async def facets() -> JSONResponse:
        return JSONResponse(await service.facets())

    @app.get("/thumbnails/{image_id:path}")
    async def thumbnail(image_id: str) -> Response:
        data = await service.thumbnail(image_id)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    @app.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(describe(limits))

    @app.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(describe(limits)))

    @app.get("/docs.css")
    async def style() -> Response:
        return Response(STYLE, media_type="text/css")

    @app.api_route("/", methods=["GET", "HEAD"])
    async def start() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static", StaticFiles(directory=PAGE))
    return app


def _check_embed(texts: list[str], photos: list[bytes], prompts: list[str]) -> None:
    if bool(texts) == bool(photos):
        raise Refusal(422, "nothing to embed, or two kinds of it: give texts, or photos")
    if prompts and len(prompts) != len(photos):
        raise Refusal(422, f"{len(photos)} photos and {len(prompts)} prompts: give one prompt for each photo, or none")

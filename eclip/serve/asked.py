"""The fields of a search to a question."""

from dataclasses import dataclass

from eclip.search.query import Filters, Query
from eclip.serve.forms import Fields
from eclip.serve.limits import Limits, Refusal

FIELDS = (
    *("words", "photo", "box", "category", "source", "attribute", "price_min", "price_max", "limit", "hybrid"),
    *("rerank", "fold", "locate"),
)  # fmt: skip


def read_query(fields: Fields, limits: Limits) -> Query:
    """A question whose photo is the bytes that were sent. Raises Refusal, 422."""
    fields.only(FIELDS)
    words, photo, box = fields.text("words"), fields.photo("photo"), fields.box("box")
    if words is None and photo is None:
        raise Refusal(422, "nothing is asked: give words, a photo or both")
    try:
        filters = Filters(
            category=fields.text("category"),
            source=fields.text("source"),
            attributes=_attributes(fields.texts("attribute", limits.fields)),
            price_min=fields.number("price_min"),
            price_max=fields.number("price_max"),
        )
        limit = fields.integer("limit", 10, 1, limits.hits)
        locate = fields.switch("locate") if fields.one("locate") is not None else None
        if locate and limit > limits.located:
            raise Refusal(422, f"locate with limit={limit}: words are looked for in at most {limits.located} pictures")
        return Query(
            words=words,
            image=photo,
            box=box,
            filters=filters,
            limit=limit,
            hybrid=fields.switch("hybrid"),
            rerank=fields.integer("rerank", 0, 0, limits.rerank),
            fold=fields.switch("fold") if fields.one("fold") is not None else True,
            locate=locate,
        )
    except ValueError as error:
        raise Refusal(422, str(error)) from None


def _attributes(texts: list[str]) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise Refusal(422, f"attribute={text[:60]!r}: name=value is wanted, as in color=red")
        if attributes.setdefault(name, value) != value:
            raise Refusal(422, f"attribute {name[:60]!r} is given twice: a product has one value of it")
    return attributes


@dataclass(frozen=True)
class Place:
    """What is looked for, and in which picture: one of the index, or a photo that was sent."""

    id: str | None
    photo: bytes | None
    words: str | None
    exemplar: bytes | None
    box: tuple[float, float, float, float] | None
    """Of the exemplar."""


def read_place(fields: Fields) -> Place:
    """The fields of /locate. Raises Refusal, 422."""
    fields.only(("id", "photo", "words", "exemplar", "box", "limit"))
    place = Place(
        fields.text("id"), fields.photo("photo"), fields.text("words"), fields.photo("exemplar"), fields.box("box")
    )
    if (place.id is None) == (place.photo is None):
        raise Refusal(422, "where to look: give the id of a picture of the index, or a photo")
    if (place.words is None) == (place.exemplar is None):
        raise Refusal(422, "what to look for: give words, or an exemplar (an image)")
    if place.box is not None and place.exemplar is None:
        raise Refusal(422, "box without an exemplar: it is the part of the exemplar that is meant")
    return place

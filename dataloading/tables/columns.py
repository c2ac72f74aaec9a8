"""Which column of a table is which field: by its own name, by an alias that shops and data sets use, or as told.

Names are compared by their letters and digits alone: "Product Title", product_title and productTitle are one. Of
several candidates the first in the order of ALIASES that is not empty is taken, and the report says so.
"""

import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from .values import shown

FIELDS = ("product", "title", "category", "image", "sku", "source", "catalog")

_GROUPS = ("itemgroupid", "handle", "parentasin", "parentsku", "parentid")
"""Ids that a product's variants share: preferred to a variant's own id, which a row without a group falls back to."""

ALIASES: Mapping[str, tuple[str, ...]] = {
    "product": (
        *("product", "productid", *_GROUPS, "id", "itemid", "articleid", "articlenumber", "productcode", "code"),
        *("asin", "uniqid", "labelgroup", "slug", "sku", "productsku", "gtin", "ean", "upc", "mpn"),
    ),
    "title": (
        *("title", "name", "productname", "producttitle", "itemname", "itemtitle", "productdisplayname"),
        *("displayname", "articlename", "prodname", "titleen", "caption"),
    ),
    "category": (
        *("category", "categories", "categoryname", "producttype", "productcategory", "googleproductcategory"),
        *("maincategory", "mastercategory", "subcategory", "categorypath", "articletype", "producttypename"),
        *("productgroup", "productgroupname", "department", "facets", "collection", "collections", "type"),
        *("label", "classname"),
    ),
    "image": (
        *("image", "images", "imagepath", "imagepaths", "imagefile", "imagefilename", "imagefiles", "imagename"),
        *("filename", "filepath", "file", "files", "path", "assets", "asset", "photo", "photos", "picture"),
        *("pictures", "img", "imgs", "imgpath", "imagesrc", "imagelink", "imageurl", "imageurls", "imgsrc", "imgurl"),
        *("mainimage", "mainimageurl", "mainimagepath", "primaryimage", "primaryimageurl", "featuredimage"),
        *("baseimage", "productimage", "productimages", "productimageurl", "defaultimage", "photourl", "pictureurl"),
        *("media", "thumbnail", "variantimage", "imageid"),
    ),
    "sku": ("sku", "skuid", "variantsku", "itemsku"),
    "source": ("source",),
    "catalog": ("catalog", "catalogid", "catalogue", "catalogueid"),
}

_FURTHER_IMAGES = re.compile(
    r"(additional|other|gallery)(image|photo|picture)(s|url|urls|link|links|src|path|paths)?\d*"
)
_LISTED = 30


def compact(name: str) -> str:
    """Letters and digits of a column's name, without case: what names are compared by."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _base(name: str) -> str:
    """`compact` of a column that may be its name's second, called "title (2)"."""
    return compact(re.sub(r" \(\d+\)$", "", name))


def _prefixed(name: str, prefix: str) -> str:
    """What follows "title_" or "attribute_" in a column's name, or ""."""
    return name[len(prefix) :].strip() if name.casefold().startswith(prefix) else ""


_KNOWN = {alias for aliases in ALIASES.values() for alias in aliases}


def is_known(name: str) -> bool:
    """Whether a column of this name may serve a field."""
    short = compact(name)
    known = _base(name) in _KNOWN or short.rstrip("0123456789") in ALIASES["image"]
    prefixed = _prefixed(name, "title_") or _prefixed(name, "attribute_")
    return known or bool(prefixed) or _FURTHER_IMAGES.fullmatch(short) is not None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The column of each field that a table has; `images` are all columns of images, in order."""

    fields: Mapping[str, str]
    own_id: str = ""
    """For rows whose product column, one of variants' groups, is empty."""
    images: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    """Column by language."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Column by the attribute's name."""
    notes: tuple[str, ...] = ()
    """What the user is to know: fields without a column, columns passed over."""

    @property
    def used(self) -> set[str]:
        """All columns that are read."""
        several = (self.images, self.titles.values(), self.attributes.values(), filter(None, [self.own_id]))
        return {*self.fields.values(), *(name for group in several for name in group)}

    def describe(self) -> str:
        """The mapping in one line, "title <- name"."""
        mapping = dict(self.fields) | ({"image": ", ".join(self.images)} if self.images else {})
        if self.own_id:
            mapping["product"] += f" (where empty: {self.own_id})"
        return "; ".join(f"{name} <- {column}" for name, column in mapping.items())


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Command-line texts "title=name" as {"title": "name"}; "source=" leaves a field out. Raises ValueError."""
    columns: dict[str, str] = {}
    for text in given:
        name, equals, column = text.partition("=")
        name, column = name.strip(), column.strip()
        if not equals:
            raise ValueError(f"--column {text}: expected FIELD=NAME, such as --column title=name")
        if name in columns:
            raise ValueError(f"--column {text}: {name} is given twice; a field has one column")
        columns[name] = column
    return columns


def check_fields(given: Mapping[str, str]) -> None:
    """Raise ValueError for unknown fields, and for required ones that are left out."""
    for name, column in given.items():
        prefixed = name.removeprefix("title_") if name.startswith("title_") else name.removeprefix("attribute_")
        if name not in FIELDS and (prefixed == name or not prefixed):
            known = ", ".join(FIELDS)
            raise ValueError(
                f"--column {name}={column}: unknown field {name!r}; the fields are {known}, title_<language> and "
                "attribute_<name>"
            )
        if not column and name in ("title", "image"):
            raise ValueError(f"--column {name}=: {name} cannot be left out; give the name of its column")


class Mapper:
    """Chooses the columns of one table.

    names: its columns; given: column by field, see `check_fields`; filled: those with a cell that is not empty;
    texts: those of them with one that may be a text.
    """

    def __init__(
        self, table: str, names: Sequence[str], given: Mapping[str, str], *, filled: Set[str], texts: Set[str]
    ) -> None:
        self.table, self.names, self.filled, self.texts = table, names, filled, texts
        self.given = {name: self._told(name, column) for name, column in given.items()}
        self.taken = {column for name, column in self.given.items() if name in FIELDS}
        self.notes: list[str] = []

    @staticmethod
    def _listed(names: Sequence[str]) -> str:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return ", ".join(name if name and len(name) <= 60 else shown(name) for name in names[:_LISTED]) + more

    def require(self) -> None:
        """Raise ValueError, naming all columns, unless there is one for titles and one for images."""
        there = {"title": self._choose("title"), "image": self.image_candidates()}
        absent = [name for name, columns in there.items() if not columns]
        if absent:
            flags = " ".join(f"--column {name}=NAME" for name in absent)
            raise ValueError(
                f"{self.table}: no column for {' and '.join(absent)}; the first line must name the columns (in JSON "
                f"lines the keys do), and it has: {self._listed(self.names)}; say which with {flags}"
            )

    def image_candidates(self) -> list[list[str]]:
        """Groups of columns that may hold the images, best first: image; image_1, image_2, ...; further ones."""
        if "image" in self.given:
            return [[self.given["image"]]]
        free = [name for name in self.names if name not in self.taken]
        groups: list[list[str]] = []
        for alias in ALIASES["image"]:
            numbers = {name: compact(name)[len(alias) :] for name in free if compact(name).startswith(alias)}
            group = [name for name, number in numbers.items() if not number or number.isdecimal()]
            groups.append(sorted(group, key=lambda name: int(numbers[name] or 0)))
        groups.append(self.further_images())
        groups = [[name for name in group if name in self.filled] or group for group in groups if group]
        return sorted(groups, key=lambda group: group[0] not in self.filled)

    def further_images(self) -> list[str]:
        """Columns that add to a first one's images, such as additional_image_link."""
        free = [] if "image" in self.given else [name for name in self.names if name not in self.taken]
        return [name for name in free if _FURTHER_IMAGES.fullmatch(compact(name))]

    def columns(self, images: Sequence[str]) -> Columns:
        """The mapping, with these columns for the images; call `require` first."""
        self.taken |= set(images)
        fields = {name: column for name in FIELDS if name != "image" and (column := self._choose(name))}
        own_id = ""
        if "product" not in fields:
            fields = {"product": fields["title"], **fields}
            self.notes.append(f"no product id: rows of one {fields['title']} are one product (--column product=NAME)")
        elif "product" not in self.given and compact(fields["product"]) in _GROUPS:
            own_id = self._candidate("product", without=_GROUPS)
            if own_id and "sku" not in self.given:
                fields.setdefault("sku", own_id)
        if "category" not in fields:
            self.notes.append("no category: every product gets the category 'all' (--column category=NAME)")
        result = Columns(
            fields=fields,
            own_id=own_id,
            images=tuple(images),
            titles=self._family("title_"),
            attributes=self._family("attribute_"),
        )
        self._note_passed_over(result)
        unused = [name for name in self.names if name not in result.used]
        if unused:
            self.notes.append(f"not used: {self._listed(unused)}")
        return replace(result, notes=tuple(self.notes))

    def _told(self, name: str, column: str) -> str:
        if not column:
            return ""
        alike = [known for known in self.names if compact(known) == compact(column) and compact(column)]
        if column in self.names:
            return column
        if len(alike) != 1:
            wrong = f"fits several columns ({', '.join(alike)})" if alike else "no such column"
            raise ValueError(
                f"{self.table}: --column {name}={column}: {wrong}; the table has: {self._listed(self.names)}"
            )
        return alike[0]

    def _choose(self, name: str) -> str:
        return self.given[name] if name in self.given else self._candidate(name)

    def _candidates(self, name: str, without: Collection[str] = ()) -> list[list[str]]:
        """Free columns by alias, best first, the empty ones last."""
        free = [column for column in self.names if column not in self.taken]
        aliases = [alias for alias in ALIASES[name] if alias not in without]
        alike = [[c for c in free if _base(c) == alias and c in self.texts] for alias in aliases]
        empty = [[c for c in free if _base(c) == alias and c not in self.texts] for alias in aliases]
        return [columns for columns in alike + empty if columns]

    def _candidate(self, name: str, without: Collection[str] = ()) -> str:
        columns = next(iter(self._candidates(name, without)), [])
        if len(columns) > 1:
            raise ValueError(
                f"{self.table}: {len(columns)} columns may be {name}: {', '.join(columns)}; choose one with "
                f"--column {name}={columns[0]!r} or --column {name}={columns[1]!r}"
            )
        return columns[0] if columns else ""

    def _family(self, prefix: str) -> dict[str, str]:
        """Columns by what follows the prefix in their names; in a language's name case means nothing."""
        found: dict[str, str] = {}
        told = {name: column for name, column in self.given.items() if name.startswith(prefix) and column}
        for name, column in [*told.items(), *((column, column) for column in self.names)]:
            key = _prefixed(name, prefix)
            key = key.casefold() if prefix == "title_" else key
            if not key or (f"{prefix}{key}" in told and column == name):
                continue
            if key in found:
                both = f"{found[key]!r} and {column!r}"
                raise ValueError(f"{self.table}: the columns {both} are both {prefix}{key}; rename one")
            found[key] = column
        return found

    def _note_passed_over(self, columns: Columns) -> None:
        for name in ("product", "title", "category"):
            others = [c for group in self._candidates(name) for c in group if c in self.texts - columns.used]
            if others and name not in self.given and name in columns.fields:
                self.notes.append(
                    f"{name}: {columns.fields[name]} was preferred to {', '.join(others)} "
                    f"(--column {name}=NAME for another)"
                )

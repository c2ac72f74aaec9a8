"""Lines of text in a picture, in any script: for every letter a font that has it; letters that no font has are named.

One font seldom has all letters of a title, so a line is cut into runs of one font each. Within a run the layout engine
of Pillow (raqm, where it is installed) joins letters and orders them from right to left; the runs are ordered here.
"""

import importlib.util
import io
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont, features

FONT_PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
"""Python packages that hold Noto fonts, used when they are installed."""
WAY_OUT = (
    f"install a font that has them, or put it into ~/.local/share/fonts, or "
    f"pip install {' '.join(FONT_PACKAGES).replace('_', '-')}"
)

_SHOWN = 2  # missing letters named within a line, and at the end of a sheet:
_SHOWN_IN_ALL = 8
_LONGEST = 500  # letters of a title that are looked at
# Fonts for every letter there is, which they show as boxes or blanks.
_NO_FONTS = ("lastresort", "adobeblank", "unifontupper")
_LAST = ("italic", "oblique", "bold", "black", "mono", "serif", "condensed", "light", "thin", "math", "display")
_JOINERS = "\u200c\u200d"


@dataclass(eq=False)
class Face:
    """A font, and those of the wanted letters that it has."""

    font: ImageFont.FreeTypeFont
    letters: set[str] = field(default_factory=set)


class Lettering:
    """Draws some texts. `missing` holds the letters of all of them for which there is no font, in order."""

    def __init__(self, texts: Iterable[str], size: int, *, fonts: Sequence[Path] | None = None) -> None:
        """size: pixels. fonts: files to choose from, those of this machine by default, beside Pillow's own one."""
        self.size = size
        wanted = dict.fromkeys("".join(clean(text) for text in texts) + string.printable.strip() + " …")
        self.faces: list[Face] = []
        default = ImageFont.load_default(size)
        assert isinstance(default, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        self._keep(default, _charmap(io.BytesIO(default.font_bytes)) & wanted.keys())
        self._choose(set(wanted), font_files() if fonts is None else fonts)
        found = self._found()
        self.missing = [c for c in wanted if c not in found and not _is_silent(c)]
        self.unshaped = not features.check("raqm") and any(_needs_shaping(c) for c in found)
        """Whether letters that must be joined or reordered stand as they are: this Pillow has no raqm."""

    def _found(self) -> set[str]:
        return set().union(*(face.letters for face in self.faces))

    def _keep(self, font: ImageFont.FreeTypeFont, letters: Iterable[str]) -> None:
        """A font's letters, but for those that it only claims to have (glyphs in colour, which come out empty)."""
        drawn = {c for c in letters if c.isspace() or _is_silent(c) or font.getmask(c).getbbox() is not None}
        if drawn:
            self.faces.append(Face(font, drawn))

    def _choose(self, wanted: set[str], files: Sequence[Path]) -> None:
        """Take the font with the most of what is still missing, again and again: a script stays in one font."""
        offers: list[tuple[Path, set[str]]] | None = None  # the machine's fonts are opened only where they are needed
        while missing := {c for c in wanted - self._found() if not _is_silent(c)}:
            if offers is None:
                offers = [(path, _charmap(path) & wanted) for path in files]
            best = max(offers, key=lambda offer: len(offer[1] & missing), default=None)  # the first of equals
            if best is None or not best[1] & missing:
                return
            offers.remove(best)
            if font := _open(best[0], self.size):
                self._keep(font, best[1])  # also what others have: fewer changes of font within a line

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: str, width: float) -> None:
        """One line from `place` (left end of the base line) on, cut to `width` pixels with an ellipsis."""
        x, y = place
        for part, face, letters in self.fit(text, width):
            draw.text((x, y), letters, "firebrick" if part == "missing" else fill, face.font, anchor="ls")
            x += face.font.getlength(letters)

    def fit(self, text: str, width: float) -> list[tuple[str, Face, str]]:
        """Runs in the order of the picture, from left to right: "text" or "missing", font, letters."""
        text = clean(text)
        if self._length(whole := self._runs(text)) <= width:
            return whole
        low, high = 0, len(text)
        while low + 1 < high:
            middle = (low + high) // 2
            if self._length(self._runs(_cut(text, middle))) <= width:
                low = middle
            else:
                high = middle
        return self._runs(_cut(text, low))

    def _length(self, runs: list[tuple[str, Face, str]]) -> float:
        return sum(face.font.getlength(letters) for _, face, letters in runs)

    def _runs(self, text: str) -> list[tuple[str, Face, str]]:
        runs: list[tuple[str, Face, str]] = []
        for face, letters in self._by_face(text):
            runs.append(("missing", self.faces[0], _codes(letters)) if face is None else ("text", face, letters))
        return _visual(runs, right_to_left=_is_right_to_left(text))

    def _by_face(self, text: str) -> Iterator[tuple[Face | None, str]]:
        """Runs in the order of the text: one where a font has all of it, else a font is kept as long as it can be."""
        face = next((f for f in self.faces if f.letters.issuperset(text)), None)
        places: list[tuple[Face | None, str]] = []
        for place, c in enumerate(text):
            if c == " " and face is not None and text[place + 1 : place + 2] not in face.letters:
                face = self.faces[0]  # the emoji font's space is twice as wide
            if face is None or c not in face.letters:
                if _is_silent(c):
                    continue
                if places and places[-1][0] is None and c == " ":
                    face = None
                else:
                    face = next((f for f in self.faces if c in f.letters), None)
            places.append((face, c))
        for _, run in groupby(places, key=lambda place: id(place[0])):
            found = list(run)
            yield found[0][0], "".join(c for _, c in found)

    def note(self) -> str:
        """What a reader of the picture must know, in one line; "" when every letter is there."""
        notes = []
        if self.missing:
            shown = " ".join(_code(c) for c in self.missing[:_SHOWN_IN_ALL])
            more = " ..." if len(self.missing) > _SHOWN_IN_ALL else ""
            notes.append(f"no font here has {len(self.missing)} letters of the titles ({shown}{more})")
        if self.unshaped:
            notes.append("this Pillow has no raqm: letters of joined and right-to-left scripts stand one by one")
        return "; ".join(notes)


def clean(text: str) -> str:
    """One line without control and direction characters, of bounded length."""
    text = " ".join(text[:_LONGEST].split())
    kinds = ((c, unicodedata.category(c)) for c in text)
    return "".join(c for c, kind in kinds if kind != "Cc" and (kind != "Cf" or c in _JOINERS))


def font_files() -> list[Path]:
    """Fonts of this machine: matplotlib's DejaVu Sans, those of Python packages, the system's; plain faces first."""
    own = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    packaged = []
    for name in FONT_PACKAGES:
        if (spec := importlib.util.find_spec(name)) is not None:
            packaged += [
                p for folder in spec.submodule_search_locations or () for p in Path(folder).glob("*.[ot]t[fc]")
            ]
    system = [Path(p) for p in findSystemFonts()]
    names = {p: p.stem.lower().replace(" ", "") for p in packaged + system}
    usable = [p for p in sorted(packaged) + sorted(system) if not names[p].startswith(_NO_FONTS)]
    return [own, *sorted(usable, key=lambda p: sum(word in names[p] for word in _LAST))]


def _charmap(source: Path | io.BytesIO) -> set[str]:
    try:
        codes = FT2Font(str(source) if isinstance(source, Path) else source).get_charmap()
    except Exception:  # a file that is no font: OSError, RuntimeError and more
        return set()
    return set(map(chr, codes))


def _open(path: Path, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        font = ImageFont.truetype(path, size)
    except OSError:  # pictures of one size only, as colour emoji have
        return None
    try:
        weights = [axis["name"] in (b"Weight", "Weight") for axis in font.get_variation_axes()]
        if weights == [True]:
            font.set_variation_by_axes([400])  # Noto's CJK font begins at its thinnest
    except (OSError, NotImplementedError):  # not a variable font
        pass
    return font


def _is_silent(c: str) -> bool:
    """Joiners, variation selectors and the like: nothing is missing when a font has none."""
    return c in _JOINERS or "\ufe00" <= c <= "\ufe0f" or "\U000e0000" <= c <= "\U000e0fff" or c in "\u034f\u3164"


def _needs_shaping(c: str) -> bool:
    return unicodedata.bidirectional(c) in ("R", "AL") or "\u0900" <= c <= "\u0dff" or "\u1000" <= c <= "\u17ff"


def _is_right_to_left(text: str) -> bool:
    """The direction of the first letter that has one."""
    kinds = (unicodedata.bidirectional(c) for c in text)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


def _visual(runs: list[tuple[str, Face, str]], *, right_to_left: bool) -> list[tuple[str, Face, str]]:
    """Order runs for the picture: the line's direction for groups of runs, each group's own within it."""
    directions = []
    for part, _, letters in runs:
        strong = part == "missing" or any(unicodedata.bidirectional(c) in ("L", "R", "AL") for c in letters)
        own = _is_right_to_left(letters) if strong else right_to_left
        directions.append(own and part != "missing")
    groups = []
    for direction, group in groupby(zip(directions, runs, strict=True), key=lambda pair: pair[0]):
        found = [run for _, run in group]
        groups.append(found[::-1] if direction else found)
    return [run for group in (groups[::-1] if right_to_left else groups) for run in group]


def _cut(text: str, length: int) -> str:
    """The first letters and an ellipsis, no letter without its marks."""
    while 0 < length < len(text) and (unicodedata.category(text[length])[0] == "M" or text[length] in _JOINERS):
        length -= 1
    return text[:length].rstrip() + "…"


def _codes(letters: str) -> str:
    named = [_code(c) for c in letters if c != " "]
    more = f" … {len(named)} letters" if len(named) > _SHOWN else ""
    return f"[{' '.join(named[:_SHOWN])}{more}]" + " " * letters.endswith(" ")


def _code(c: str) -> str:
    return f"U+{ord(c):04X}"

"""The picture of overlays: what it says of letters it cannot show, and that it is written whole."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eclip.evaluate.report.lettering import font_files
from eclip.evaluate.report.sheet import Overlay, draw_sheet
from eclip.files import CannotWrite

FONTS = font_files()[:1]


def overlay(title: str) -> Overlay:
    grey, box = np.full((32, 32, 3), 127, np.uint8), np.array([4.0, 4, 20, 20])
    ramp = np.linspace(0, 1, 32)[None].repeat(32, 0)
    return Overlay(image=grey, title=title, truth=box, maps={"instance": ramp}, boxes={"instance": box})


def test_a_sheet_says_which_letters_are_missing(tmp_path: Path) -> None:
    whole, lacking = tmp_path / "whole.png", tmp_path / "new" / "lacking.png"
    assert draw_sheet([overlay("Lamp €20")], whole, fonts=FONTS) == ""
    assert "U+6C99" in draw_sheet([overlay("沙发"), overlay("x" * 300), overlay("")], lacking, fonts=FONTS)
    with Image.open(whole) as one, Image.open(lacking) as two:
        rows = np.asarray(two)[-14:]
        assert two.height > 2 * one.height and (rows[..., 0] > rows[..., 1] + 50).any(), "the note, in red"


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sheet.png"
    draw_sheet([overlay("old")], path, fonts=FONTS)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"sheet.png: cannot be written \(No space left on device"):
        draw_sheet([overlay("new")], path, fonts=FONTS)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["sheet.png"]

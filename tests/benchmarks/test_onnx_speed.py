"""ONNX graphs of an export in turns: a row a graph, and an export without int8 is refused."""

from pathlib import Path

import pytest

from benchmarks import onnx_speed
from eclip.dataloading.text import Tokenizer
from eclip.export import onnx_files
from tests.export.test_towers import WORDS, made


@pytest.mark.parametrize("int8", [True, False])
def test_a_row_a_graph(int8: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.train([*WORDS, *onnx_files._TEXTS], 128)
    onnx_files.write_onnx(tmp_path / "onnx", made(), tokenizer, onnx_speed.TOKENS, decoder=True, int8=int8)
    arguments = ["--export", str(tmp_path), "--batch", "2", "--rounds", "2"]
    if not int8:
        with pytest.raises(SystemExit):
            onnx_speed.main(arguments)
        assert "eclip export --onnx --int8 writes it" in capsys.readouterr().err
        return
    onnx_speed.main(arguments)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["image", "text", "decoder"]
    assert all(float(cell) > 0 for row in rows for cell in row[2:5])

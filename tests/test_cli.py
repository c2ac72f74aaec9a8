"""The `eclip` command, as a user starts it: what it lists, what it refuses, and that its commands are those of old."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eclip.dataloading.demo.pack
import eclip.dataloading.pack
import eclip.evaluate.__main__
import eclip.export.__main__
import eclip.search.__main__
import eclip.search.embed.__main__
import eclip.serve.__main__
import eclip.train
from eclip import __version__, cli
from tests.helpers import ROOT, rank_environment, run_command
from tests.processes import Processes

MAINS = {
    "pack": ("eclip.dataloading.pack", eclip.dataloading.pack.main),
    "train": ("eclip.train", eclip.train.main),
    "evaluate": ("eclip.evaluate", eclip.evaluate.__main__.main),
    "export": ("eclip.export", eclip.export.__main__.main),
    "embed": ("eclip.search.embed", eclip.search.embed.__main__.main),
    "search": ("eclip.search", eclip.search.__main__.main),
    "serve": ("eclip.serve", eclip.serve.__main__.main),
    "demo": ("eclip.dataloading.demo", eclip.dataloading.demo.pack.main),
}
"""Command -> the module that `python -m` runs, and its main."""
COMMANDS = "Commands: pack, train, evaluate, export, embed, search, serve, demo"


def run(*arguments: str, module: str = "eclip") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m eclip ...`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=rank_environment(),
        cwd=ROOT,
    )
    return done.returncode, done.stdout, done.stderr


# --- The command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["eclip", "eclip.cli"])
def test_help_lists_every_command_with_a_line(module: str) -> None:
    status, out, err = run("--help", module=module)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: python -m {module} COMMAND [FLAGS]\n")
    listed = re.findall(r"^  (\w+) +(\w.+)$", out, re.MULTILINE)
    assert dict(listed) == cli.COMMANDS and cli.COMMANDS.keys() == MAINS.keys()


def test_nothing_asked_is_help_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: eclip COMMAND [FLAGS]\n")
    cli.main(["--help"])
    assert capsys.readouterr().out == err


def test_help_is_quick() -> None:
    """No torch, which takes seconds: the fastest of a few starts, since other work may slow one."""
    spent = []
    for _ in range(4):
        start = time.perf_counter()
        assert run("--help")[0] == 0
        spent.append(time.perf_counter() - start)
        if spent[-1] < 0.3:
            break
    assert min(spent) < 1.5, spent
    code = (
        "import sys; from eclip.cli import main; main(['--help']); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert run_command([sys.executable, "-c", code]).endswith("[]\n")


@pytest.mark.parametrize(
    ("argument", "near"), [("trian", "train"), ("Evaluate", "evaluate"), ("evalaute", "evaluate"), ("packs", "pack")]
)
def test_no_such_command_names_the_near_one(argument: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([argument, "--steps", "3"]) == 2
    assert capsys.readouterr() == (
        "",
        f"eclip: error: {argument}: no such command; did you mean {near}? {COMMANDS}\n",
    )


def test_no_such_command_and_none_near() -> None:
    assert run("nosuch") == (2, "", f"python -m eclip: error: nosuch: no such command. {COMMANDS}\n")


def test_an_empty_command_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([""]) == 2
    assert "error: the command is empty" in capsys.readouterr().err


def test_help_that_nobody_can_read_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "eclip", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=rank_environment(), cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")
    status, _, err = run("--steps", "3")
    assert status == 2 and "--steps: a command comes before its flags" in err and COMMANDS in err


def test_version() -> None:
    assert run("--version") == (0, f"eclip {__version__}\n", "")


def test_installed_script_says_the_same() -> None:
    """Where this checkout is installed (pip install -e .)."""
    script = Path(sys.executable).with_name("eclip")
    if not script.exists():
        pytest.skip("the eclip script is not installed beside this Python")
    assert run_command([str(script), "--help"]).startswith("usage: eclip COMMAND [FLAGS]\n")


# --- Its commands -----------------------------------------------------------------------------------------------------


def usage(text: str) -> str:
    return " ".join(text.partition("[-h]")[0].split())


@pytest.mark.parametrize("command", MAINS)
def test_help_of_a_command_is_the_program_s_under_its_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, main = MAINS[command]
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    ours = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    theirs = capsys.readouterr().out
    assert end.value.code == 0
    assert usage(ours) == f"usage: eclip {command}" and usage(theirs) == f"usage: python -m {module}"
    assert set(re.findall(r"--[\w-]+", ours)) == set(re.findall(r"--[\w-]+", theirs)) > {"--help"}


@pytest.mark.parametrize(
    ("command", "flags", "line"),
    [
        ("train", ["--steppes", "3"], "error: --steppes: no such flag; did you mean --steps"),
        ("evaluate", ["--checkpoint", "x", "--limits", "3"], "error: "),
        ("export", ["--checkpoint", "x"], "error: "),
        ("embed", ["--out", "x", "--parket"], "error: "),
        ("search", ["--limits", "3"], "error: "),
        ("serve", ["--port", "x"], "error: "),
        ("pack", [], "{prog}: error: the following arguments are required: --table, --images, --out"),
        ("demo", ["--sed", "3", "x"], "{prog}: error: unrecognized arguments: "),
    ],
)
def test_a_refusal_is_the_program_s_under_its_name(
    command: str, flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    module, main = MAINS[command]
    for start, prog in ((lambda: cli.main([command, *flags]), f"eclip {command}"), (lambda: main(flags), None)):
        with pytest.raises(SystemExit) as end:
            start()
        assert end.value.code == 2
        out, err = capsys.readouterr()
        name = prog or f"python -m {module}"
        assert out == "" and err.startswith(line.format(prog=name)) and err.count("\n") == 1
        said.append(err.replace(name, "PROGRAM"))
    assert said[0] == said[1]


@pytest.mark.parametrize("status", [0, 1, 143])
def test_train_ends_with_its_status(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eclip.train, "main", lambda argv, prog: status)
    with pytest.raises(SystemExit) as end:
        cli.main(["train"])
    assert end.value.code == status


def test_a_user_s_mistake_is_status_1() -> None:
    status, out, err = run("evaluate", "--checkpoint", "no/such/run")
    assert (status, out) == (1, "") and err.startswith("error: ") and "no/such/run" in err
    status, out, err = run("pack", "--table", "no.csv", "--images", ".", "--out", "never")
    assert (status, out) == (1, "") and err.startswith("python -m eclip pack: error: ") and "no.csv" in err


def test_demo_train_and_evaluate(tmp_path: Path) -> None:
    """Packed in processes that import the starting module anew, stopped by SIGTERM, evaluated."""
    data, folder = tmp_path / "data", tmp_path / "run"
    demo = [
        sys.executable,
        "-m",
        "eclip",
        "demo",
        "--out",
        str(data),
        "--image-size",
        "48",
        "--images-per-product",
        "6",
    ]
    run_command([*demo, "--limit", "40", "--workers", "2"])
    train = [sys.executable, "-m", "eclip", "train", "--preset", "debug", "--run-dir", str(folder), "--resume"]
    train += ["--data-dir", str(data), "--demo-products", "40", "--checkpoint-every", "100000", "--no-evaluate"]
    with Processes() as processes:
        trainer = processes.start([*train, "--steps", "100000"])
        processes.wait_for(r"step 2/")
        trainer.send_signal(signal.SIGTERM)
        assert processes.wait(trainer) == 128 + signal.SIGTERM, processes.output
        assert "continue with --resume" in processes.output
    out = run_command([sys.executable, "-m", "eclip", "evaluate", "--checkpoint", str(folder), "--quiet"])
    assert "test split" in out

"""What several test files share: a tolerance, a way to run code on several ranks, and the list of our files."""

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "dataloading", "eclip", "benchmarks", "tests")
"""With code, at the top."""


def assert_as_accurate(
    out: Tensor, low: Tensor, exact: Tensor, *, factor: float = 2.0, floor: float = 1e-5, name: str = "output"
) -> None:
    """Assert that `out` misses the float64 result by at most `factor` times what plain PyTorch misses it by.

    out: result under test. low: the reference computed in the same dtype and from the same inputs as `out`.
    exact: the reference computed in float64. Errors are maxima over elements, relative to the largest |exact|;
    `floor` is the relative error that is always allowed (the reference may hit the exact result by luck).
    Non-finite values must stand in the same places in `out` and `exact`. Raises AssertionError.
    """
    assert out.shape == exact.shape == low.shape, f"{name}: shapes {out.shape}, {low.shape}, {exact.shape} differ"
    out, low, exact = (t.detach().to("cpu", torch.float64) for t in (out, low, exact))
    finite = exact.isfinite()
    assert torch.equal(out.isfinite(), finite), f"{name}: non-finite values where the float64 result is finite (or not)"
    if not finite.any():
        return
    scale = exact[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((out - exact)[finite].abs().max() / scale).item()
    # A reference that overflows at an element where the float64 result is finite tells nothing there.
    low_error = ((low - exact)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max() / scale).item()
    limit = max(factor * low_error, floor)
    assert error <= limit, f"{name}: relative error {error:.3e}, allowed {limit:.3e} (plain PyTorch: {low_error:.3e})"


def our_files(*suffixes: str) -> list[PurePosixPath]:
    """The project's files with one of `suffixes`, relative to the root; what a run leaves beside them is not ours.

    Those that git knows; where there is no git or no repository (an unpacked archive), those of the folders with code.
    """
    command = ["git", "ls-files", "-z"]
    with suppress(OSError, subprocess.CalledProcessError):
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted(PurePosixPath(name) for name in names if name.endswith(suffixes) and (ROOT / name).is_file())
    found = [path for folder in FOLDERS for path in files_below(folder)] + [p for p in ROOT.glob("*") if p.is_file()]
    return sorted(PurePosixPath(path.relative_to(ROOT)) for path in found if path.name.endswith(suffixes))


def files_below(folder: str, pattern: str = "*") -> list[Path]:
    """The files of a top-level folder; the links eclip/kernels and eclip/dataloading are not followed."""
    links = [ROOT / "eclip/kernels", ROOT / "eclip/dataloading"]
    found = sorted((ROOT / folder).rglob(pattern))
    return [path for path in found if path.is_file() and not any(path.is_relative_to(link) for link in links)]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """As on a full disk: writing beyond `limit` bytes of a file fails (EFBIG; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def free_port() -> int:
    """A TCP port of the loopback device that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for subprocesses of a test: the repository importable, one thread each, gloo on loopback."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    base = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TQDM_DISABLE": "1"}
    return {**base, **(env or {})}


def run_command(
    command: list[str], *, timeout: float = 120, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a command and return stdout and stderr together, in the order written.

    Raises AssertionError with the whole output when the command fails or outlasts `timeout` seconds; the command's
    process group is ended with it, so that no rank outlives its test.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=rank_environment(env),
            cwd=cwd or ROOT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read()
    assert code == 0, f"{' '.join(command[:8])} ...: exit code {code}\n{output}"
    return output


def run_torchrun(
    target: str | Path,
    *args: str,
    ranks: int = 2,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program on `ranks` processes under torchrun; return the output of all of them.

    target: "-m" (then args[0] is the module), a Path to a script, or a script's source text (anything with a newline).
    Every rank has OMP_NUM_THREADS=1 and the repository on its path. The script sets up and tears down its own process
    group; to end cleanly with gloo it must drop models and optimizers, call gc.collect(), and only then destroy the
    group. Raises AssertionError with the ranks' output on failure or timeout.

        run_torchrun("-m", "eclip.train", "--preset", "debug", "--run-dir", str(tmp_path))
        run_torchrun(WORKER, str(tmp_path / "out.pt"))
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(target, str) and "\n" in target:
            script = Path(folder, "worker.py")
            script.write_text(target)
            target = script
        launcher = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        return run_command(
            [sys.executable, *launcher, str(target), *args],
            timeout=timeout,
            env=env,
            cwd=cwd,
        )

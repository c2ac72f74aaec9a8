"""Entry of `python -m eclip.kernels.compile_check`: prints a line a kernel; exits with 1 if any has a fault.

A line: registers a thread, bytes spilled, shared memory a block, bytes of it that copies have in flight, then counts
in the main loop + outside it (sass.py), then seconds. A fault (report.py) is a spill, local memory, more shared memory
than the chip has, half-precision products without tensor cores or full-precision ones on them, no compilation, or one
longer than the timeout (a kernel that spills badly compiles for 4-17 s). A spill of a random call is named and no
fault: it costs speed at a shape that nobody asked for.

The check needs a process of its own, started without TRITON_INTERPRET: Triton decides between the two at decoration.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from triton import knobs

from . import __doc__ as overview
from .calls import LISTED, parse
from .chips import SHARED_MEMORY, TENSOR_CORE
from .compiler import compile_all
from .coverage import uncompiled
from .report import Report
from .stub import Launch, launches
from .sweep import draw
from .table import README, renewed, rows

_SHOWN = (*TENSOR_CORE, "MUFU", "SHFL", "LDS+STS", "BAR")
_HEADER = f"{'  kernel':38} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>6} {'flight':>6} " + " ".join(
    f"{name:>9}" for name in ("code", *_SHOWN)
)


def main(argv: list[str] | None = None) -> int:
    """Print the lines; return the number of faulty kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m eclip.kernels.compile_check",
        description=overview,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="compile kernels whose call and name contain this")
    parser.add_argument("--call", help="compile what this call launches, for example 'slot_attention queries=7 norm'")
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="compile N random calls as well")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a kernel may take")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="kernels at a time")
    parser.add_argument("--readme", action="store_true", help="renew the table in kernels/README.md instead")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted; start this process without it")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: kernels are compiled at least one at a time")
    if args.readme:
        text = README.read_text(encoding="utf-8")
        README.write_text(renewed(text, rows(args.arch, args.timeout, args.jobs)), encoding="utf-8")
        return 0
    try:
        listed = [parse(args.call)] if args.call else LISTED
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    found = [x for arch in args.arch for x in launches(listed, arch)]
    if not args.call and (missing := uncompiled(found)):
        parser.error(f"no call launches {', '.join(missing)}: list one")
    known = {(x.arch, x.name, x.specialization) for x in found}
    drawn = [x for arch in args.arch for x in launches(draw(args.sweep, args.seed), arch)]
    odd = [x for x in drawn if (x.arch, x.name, x.specialization) not in known]
    chosen = [x for x in found if args.only in _title(x)]
    odd = [x for x in odd if args.only in _title(x, random=True)]
    if not chosen + odd:
        parser.error(f"no kernel matches --only {args.only!r}")
    print(_HEADER)
    failed = _check(chosen, args.timeout, args.jobs, random=False) + _check(odd, args.timeout, args.jobs, random=True)
    print(f"{len(chosen) + len(odd)} kernels, {failed} failed, {time.perf_counter() - start:.0f} s")
    return failed


def _title(launch: Launch, *, random: bool = False) -> str:
    return f"{'random: ' * random}{launch.call}: {launch.name}"


def _check(chosen: Sequence[Launch], timeout: float, jobs: int, *, random: bool) -> int:
    """Print a line for each, under the call that launches it; the number of faulty ones."""
    failed, call = 0, None
    for launch, outcome in compile_all(chosen, timeout, jobs):
        if launch.call != call:
            call = launch.call
            print(f"{'random: ' * random}{call}")
        if isinstance(outcome, str):
            faults, remarks, columns = [outcome], [], ""
        else:
            columns = _columns(outcome)
            faults = outcome.faults(launch.call, launch.name, launch.arch, random=random)
            remarks = [remark for remark in outcome.remarks() if remark not in faults]
        failed += bool(faults)
        ending = "  FAIL: " * bool(faults) + "; ".join(faults) + "  but " * bool(remarks) + "; ".join(remarks)
        print(f"  {launch.name:36} {launch.arch:3} {columns}{ending}", flush=True)
    return failed


def _columns(report: Report) -> str:
    code = report.code
    counts = " ".join(f"{f'{code.loop[name]}+{code.rest[name]}':>9}" for name in ("instructions", *_SHOWN))
    sizes = f"{report.registers:4} {report.spilled:5} {report.shared:6} {code.in_flight:6}"
    return f"{sizes} {counts} {report.seconds:4.1f}s"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)

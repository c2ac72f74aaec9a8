"""Train ECLIP: `python -m eclip.train`, or `torchrun --nproc_per_node=N -m eclip.train` on N devices or CPU ranks.

`prepare` finds every missing file before anything expensive starts, `Trainer.run` is the loop; both are in training/.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from .config import RunConfig
from .dataloading.system.console import say
from .parallel.ending import conclude, leave, once
from .parallel.ranks import Ranks, find_ranks, part, start_ranks
from .parallel.signals import StopSignals
from .parallel.torchrun import has_launcher, stopped_status
from .presets import parse
from .training.finite import NonFiniteLoss
from .training.metrics.sinks import MetricSink, build_sinks
from .training.prepare import prepare, single_image_note
from .training.trainer import Trainer


class CannotStart(ValueError):
    """What the user can repair before training begins; main prints its message alone."""


def train(
    config: RunConfig, ranks: Ranks, *, sinks: Sequence[MetricSink] = (), stop: StopSignals | None = None
) -> bool:
    """Prepare and train; `sinks` are called beside the configured ones. True when done, False when a stop signal came.

    stop: entered by the caller; None handles signals for the length of the call. Raises CannotStart (a ValueError) or
    Stopped before the first step, NonFiniteLoss after it. Holds no model when it returns.
    """
    with nullcontext(stop) if stop is not None else StopSignals() as signals, ExitStack() as hold:
        try:
            prepared = prepare(config, ranks, hold)
            trainer = Trainer(prepared, ranks)
        except (ValueError, OSError) as error:
            raise CannotStart(str(error)) from error
        ranks.barrier()  # the first step's collectives have a time limit, loading has none
        if ranks.is_main:
            say(trainer.describe())
            if note := single_image_note(prepared.index, config):
                say(note)
            sinks = [*build_sinks(prepared.config, start_step=trainer.step), *sinks]
        return trainer.run(sinks if ranks.is_main else (), signals)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m eclip.train") -> int:
    """Train and, at the end, evaluate. Returns the exit status: 0, 1 for an error, 128 + N after signal N.

    A run that stopped by request under torchrun --max-restarts ends with 0 too: anything else starts it again.
    """
    config = once(lambda: parse(argv, prog=prog))
    watch, unfinished = None, "stopped before the first step, nothing to save"
    with StopSignals(repeated_by_launcher=has_launcher()) as stop:
        try:
            watch = find_ranks(timeout=config.rank_timeout_seconds, stop=stop)
            ranks = start_ranks(watch)
            done = train(config, ranks, stop=stop)
            if done and config.evaluate:
                again = f"python -m eclip.evaluate --checkpoint {config.run_dir}"
                unfinished = f"the run is complete, its evaluation is not; repeat that with {again}"
                with stop.interrupting():
                    from .evaluate.together import evaluate_together

                    evaluate_together(config.run_dir, ranks)
            part(ranks)
            if stop.signum is not None and not done:
                return stopped_status(stop.signum)
        except BaseException as error:
            with stop.noted():
                return conclude(error, watch, stop, told=(ValueError, OSError, NonFiniteLoss), stopped=unfinished)
    return 0


if __name__ == "__main__":
    leave(main())

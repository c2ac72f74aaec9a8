"""A run in progress: the loop, its checkpoints, and how it stops.

Data order, random draws and the learning rate are pure functions of (seed, step): a resumed run repeats an unbroken
one, and ranks change nothing but the speed.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eclip.dataloading.system.console import say
from eclip.objectives.objective import make_objective
from eclip.parallel.ending import say_stopped
from eclip.parallel.ranks import Ranks
from eclip.parallel.sharding import last_backward
from eclip.parallel.signals import Stopped, StopSignals
from eclip.training.accumulation import accumulate
from eclip.training.build import build_model, make_loader, open_cache, open_validation
from eclip.training.checkpoint import CheckpointWriter, load_checkpoint, load_locked_towers
from eclip.training.checkpoint.files import lowest_val_loss
from eclip.training.compute import apply_compute
from eclip.training.feeding import Completion, Feed
from eclip.training.finite import SkippedSteps
from eclip.training.flight import InFlight
from eclip.training.metrics.gradients import gradient_squares, to_norms
from eclip.training.metrics.profiler import StepProfiler
from eclip.training.metrics.sinks import MetricSink
from eclip.training.metrics.spans import span
from eclip.training.metrics.throughput import Throughput, count_flops, first_step_note
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.optim import build_optimizer, learning_rate, set_learning_rate, step_if_finite
from eclip.training.prepare import Prepared
from eclip.training.step import Part, TrainStep


class Trainer:
    """A run in progress: models, optimizer, data. `run` takes the steps."""

    def __init__(self, prepared: Prepared, ranks: Ranks) -> None:
        self.prepared, self.config, self.ranks = prepared, prepared.config, ranks
        checkpoint = prepared.checkpoint
        model = build_model(self.config, pretrained=checkpoint is None)
        if checkpoint is not None and self.config.cache_features:
            load_locked_towers(checkpoint.path, model)  # the cache is that of the run's towers
        self.model = model.to(ranks.device)
        self.cache = open_cache(self.model, prepared, ranks)
        self.objective = make_objective(self.config.objective)
        self.momentum = make_momentum(self.model) if self.objective.needs_momentum else None
        self.step_module = TrainStep(self.model, self.momentum, self.config, ranks).train()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.spread, self.computes = apply_compute(self.step_module, self.config, ranks)
        """The step as its ranks call it, and how it computes."""
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.loader = make_loader(prepared, ranks)
        self.writer = CheckpointWriter(
            self.config.run_dir, ranks, keep=self.config.keep_checkpoints, background=self.config.async_checkpoints
        )
        self.validation = open_validation(prepared, ranks)
        self.in_flight = InFlight()
        self.skipped = SkippedSteps(self.config.max_nonfinite_steps, self.config.run_dir, ranks)
        self.step = self.first_step = 0
        """Steps done, and those that were done when this process began."""
        self.lowest_val_loss = math.inf
        """Of the checkpoints that are there."""
        if checkpoint is not None:
            self._load(checkpoint.path)
        prepared.commit(ranks)
        self._say_where_it_starts()

    def _load(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.momentum, self.optimizer, self.ranks)
        self.loader.load_state_dict(state["loader"])
        self.step = self.first_step = state["step"]
        self.skipped.load_state_dict(state.get("skipped", {}))
        self.lowest_val_loss = self.ranks.from_main(lambda: lowest_val_loss(self.config.run_dir))

    def _say_where_it_starts(self) -> None:
        if self.prepared.checkpoint is not None:
            self._say(f"resumed at step {self.step} from {self.prepared.checkpoint.path}")
        elif self.config.resume:
            self._say(f"--resume: no checkpoint in {self.config.run_dir}, starting at step 0")
        for note in self.prepared.notes:
            self._say(note)

    def save(self, val_loss: float | None = None) -> None:
        """A checkpoint of the steps done; all ranks call it. val_loss: of these, where it was computed."""
        # A stop drops a batch that has come already.
        state: dict[str, Any] = {
            "loader": {**self.loader.state_dict(), "step": self.step},
            "skipped": self.skipped.state_dict(),
        }
        if val_loss is not None and math.isfinite(val_loss):
            state["val_loss"] = val_loss
        with span("checkpoint"):
            self.writer.save(self.step, self.model, self.momentum, self.optimizer, state)

    def run(self, sinks: Sequence[MetricSink], stop: StopSignals) -> bool:
        """Step to config.steps, calling `sinks` every log_every steps. True when done, False after a stop signal."""
        config, left = self.config, self.config.steps - self.step
        throughput = Throughput(config.schedule, config.steps, self.step, self.ranks.device)
        feed = self._feed() if left else None
        profiler = StepProfiler(config.run_dir, self.ranks, on=config.profile, steps=left)
        with stop.noted(), self.writer, profiler:
            if config.steps == 0 and self.prepared.checkpoint is None:
                self.save()  # what the run started from, for evaluation and for a --resume with steps
            while feed is not None and self.step < config.steps:
                parts = self._next_parts(feed, throughput, stop)
                # A rank told to stop while it waits for data joins here like those that have theirs: none stands in a
                # collective of the step, waiting for one that never comes.
                if signum := self.ranks.highest(stop.signum or 0):
                    stop.signum = signum
                    self._stop(signum)
                    return False
                assert parts is not None
                self._step(parts, throughput, sinks)
                with throughput.aside():
                    profiler.step()
        return True

    def _feed(self) -> Feed:
        complete = Completion(self.objective, self.config, self.cache, self.ranks)
        return Feed(iter(self.loader), complete, self.ranks.device)

    def _next_parts(self, feed: Feed, throughput: Throughput, stop: StopSignals) -> list[Part] | None:
        """The parts of the next step; None when a stop signal came, which ends the wait for them."""
        try:
            with throughput.waiting(), stop.interrupting():
                return feed.next()
        except Stopped:
            return None

    def _stop(self, signum: int) -> None:
        """Save what no checkpoint holds yet, and say how to continue."""
        self._settle(everything=True)
        written = self.step > self.first_step
        if written:
            self.save()
            self.writer.finish()
        if self.step == 0:
            what = "stopped before the first step, nothing to save"
        else:
            what = f"checkpoint of step {self.step} {'written' if written else 'is there'}; continue with --resume"
        say_stopped(signum, what, speaks=self.ranks.is_main)

    def _step(self, parts: list[Part], throughput: Throughput, sinks: Sequence[MetricSink]) -> None:
        """One step, and what is due after it: a log line, a checkpoint."""
        config = self.config
        done = self.step + 1 == config.steps
        validates = self.validation is not None and ((self.step + 1) % config.validate_every == 0 or done)
        logs = (self.step + 1) % config.log_every == 0 or done or validates
        with throughput.taking(self.step):
            self._take_step(parts, throughput, observe=logs)
        self.step += 1
        if config.compute.compile and throughput.first_step_seconds and self.step == self.first_step + 1:
            self._say(first_step_note(throughput.first_step_seconds))
        val_loss, is_best = self._validate(throughput) if validates else (None, False)
        saves = self.step % config.checkpoint_every == 0 or done or is_best
        more = {} if val_loss is None else {"val_loss": val_loss}
        self._settle(everything=logs or saves, throughput=throughput if logs else None, sinks=sinks, more=more)
        if saves:
            self.save(val_loss)

    def _validate(self, throughput: Throughput) -> tuple[float, bool]:
        """The loss of the val split, and whether it is the lowest so far."""
        assert self.validation is not None
        with throughput.aside(), span("validate"):
            loss = self.validation(self.spread)
        is_best = loss < self.lowest_val_loss
        self.lowest_val_loss = min(loss, self.lowest_val_loss) if math.isfinite(loss) else self.lowest_val_loss
        return loss, is_best

    def _take_step(self, parts: list[Part], throughput: Throughput, *, observe: bool) -> None:
        """Tell the device to take a step; its numbers come later (`_settle`)."""
        batch, config = parts[0].batch, self.config
        assert batch.step == self.step, f"the loader gave batch {batch.step} at step {self.step}"
        # Dropout and the like, should a model have any: the same in a resumed run, and not the same on all ranks.
        torch.manual_seed(config.seed * 1_000_003 + self.step + self.ranks.rank * 250_000_000)
        rate = self._learning_rate()
        set_learning_rate(self.optimizer, rate)
        with count_flops(throughput) if throughput.wants_flops else nullcontext():
            losses = self._losses_and_gradients(parts, observe=observe)
        with span("optimizer"):
            squares = gradient_squares(self.model) if observe else {}
            norm = nn.utils.clip_grad_norm_(self.trained, config.optim.clip_norm)
            finite = self._send_numbers({**losses, "grad_norm": norm}, squares, parts, rate)
            step_if_finite(self.optimizer, finite)
            self.model.clamp_logit_scale()
            self.optimizer.zero_grad(set_to_none=True)
            if self.momentum is not None:
                update_momentum(self.model, self.momentum, config.objective.ema_momentum, finite=finite)

    def _learning_rate(self) -> float:
        schedule = self.config.schedule
        share = schedule.size(self.step) / schedule.largest
        return learning_rate(self.step, self.config.steps, self.config.optim, share=share)

    def _losses_and_gradients(self, parts: list[Part], *, observe: bool) -> dict[str, Tensor]:
        """The losses of the parts together, detached; their gradients are in the parameters."""
        if len(parts) > 1:
            module, call = self.step_module, self.spread
            return accumulate(module, call, parts, partial(last_backward, call), observe=observe)
        losses = self.spread("losses", parts[0], observe=observe)
        with span("backward"):
            losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _send_numbers(
        self, numbers: dict[str, Tensor], observed: dict[str, Tensor], parts: list[Part], rate: float
    ) -> Tensor:
        """Average a step's numbers over ranks, in one all-reduce; whether `numbers` are finite (not `observed`)."""
        every = numbers | observed
        full = [x.full_tensor() if isinstance(x, DTensor) else x for x in every.values()]
        # The device: with --cpu-offload gradients have their norms on the host.
        own = torch.stack([x.detach().to(self.ranks.device, torch.float32).reshape(()) for x in full])
        means = self.ranks.mean(own.clone())
        keys = [key for part in parts for key in part.batch.keys]
        return self.in_flight.send(self.step, keys, rate, list(every), means, own, observed=len(observed))

    def _settle(
        self,
        *,
        everything: bool,
        throughput: Throughput | None = None,
        sinks: Sequence[MetricSink] = (),
        more: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Look at the numbers that have come from the device. throughput: this step's go to the `sinks`, with rates.

        more: numbers of this step that are on the host already.
        """
        for record in self.in_flight.arrived(everything=everything):
            self.skipped.see(record)
            if throughput is not None and record.step + 1 == self.step:
                found = {**to_norms(record.means), **more}
                values = {name: value for name, value in found.items() if math.isfinite(value)}  # JSON has no NaN
                values |= {"learning_rate": record.learning_rate, **throughput.report(self.step)}
                if self.skipped.total:
                    values["skipped_steps"] = self.skipped.total
                for sink in sinks:
                    sink(self.step, values)

    def describe(self) -> str:
        """The first line of a run."""
        config, index = self.config, self.prepared.index
        device = torch.cuda.get_device_name(self.ranks.device) if self.ranks.device.type == "cuda" else "CPU"
        return (
            f"preset {config.preset} ({config.objective.objective}) on {self.ranks.world_size} x {device}, "
            f"{torch.get_num_threads()} threads | {self.num_parameters / 1e6:.1f}M parameters, "
            f"{self.num_trained / 1e6:.1f}M trained | {index.num_products} products, {index.num_images} images | "
            f"{self._describe_batch()} | {self.computes} | {config.run_dir}"
        )

    def _describe_batch(self) -> str:
        config = self.config
        size = f"batch {config.batch_schedule or config.global_batch_size}"
        return size if config.micro_batch is None else f"{size} in micro-batches of {config.micro_batch}"

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            say(text)

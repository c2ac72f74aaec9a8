"""A run in progress: the loop, its checkpoints, and how it stops.

Data order, random draws and the learning rate are pure functions of (seed, step): a resumed run repeats an unbroken
one, and ranks change nothing but the speed.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

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
from eclip.training.build import build_model, make_loader, open_cache
from eclip.training.checkpoint import load_checkpoint, load_locked_towers, save_checkpoint
from eclip.training.compute import apply_compute
from eclip.training.feeding import Completion, Feed
from eclip.training.finite import SkippedSteps
from eclip.training.flight import InFlight
from eclip.training.metrics.sinks import MetricSink
from eclip.training.metrics.throughput import Throughput, count_flops
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
        self.in_flight = InFlight()
        self.skipped = SkippedSteps(self.config.max_nonfinite_steps, self.config.run_dir, ranks)
        self.step = self.first_step = 0
        """Steps done, and those that were done when this process began."""
        if checkpoint is not None:
            self._load(checkpoint.path)
        prepared.commit(ranks)
        self._say_where_it_starts()

    def _load(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.momentum, self.optimizer, self.ranks)
        self.loader.load_state_dict(state["loader"])
        self.step = self.first_step = state["step"]

    def _say_where_it_starts(self) -> None:
        if self.prepared.checkpoint is not None:
            self._say(f"resumed at step {self.step} from {self.prepared.checkpoint.path}")
        elif self.config.resume:
            self._say(f"--resume: no checkpoint in {self.config.run_dir}, starting at step 0")
        for note in self.prepared.notes:
            self._say(note)

    def save(self) -> None:
        """A checkpoint of the steps done; all ranks call it."""
        save_checkpoint(
            self.config.run_dir,
            self.step,
            self.model,
            self.momentum,
            self.optimizer,
            {"loader": {**self.loader.state_dict(), "step": self.step}},  # a stop drops a batch that has come already
            self.ranks,
            keep=self.config.keep_checkpoints,
        )

    def run(self, sinks: Sequence[MetricSink], stop: StopSignals) -> bool:
        """Step to config.steps, calling `sinks` every log_every steps. True when done, False after a stop signal."""
        config, start = self.config, self.step
        throughput = Throughput(config.steps, start, config.global_batch_size, self.ranks.device)
        batches = iter(self.loader) if start < config.steps else iter(())
        feed = Feed(batches, Completion(self.objective, config, self.cache, self.ranks), self.ranks.device)
        if config.steps == 0 and self.prepared.checkpoint is None:
            self.save()  # what the run started from, for evaluation and for a --resume with steps
        with stop.noted():
            while self.step < config.steps:
                parts = self._next_parts(feed, throughput, stop)
                # A rank told to stop while it waits for data joins here like those that have theirs: none stands in a
                # collective of the step, waiting for one that never comes.
                if signum := self.ranks.highest(stop.signum or 0):
                    stop.signum = signum
                    self._stop(signum)
                    return False
                assert parts is not None
                done = self.step + 1 == config.steps
                logs = (self.step + 1) % config.log_every == 0 or done
                self._take_step(parts, throughput, observe=logs)
                self.step += 1
                saves = self.step % config.checkpoint_every == 0 or done
                self._settle(everything=logs or saves, throughput=throughput if logs else None, sinks=sinks)
                if saves:
                    self.save()
        return True

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
        if self.step == 0:
            what = "stopped before the first step, nothing to save"
        else:
            what = f"checkpoint of step {self.step} {'written' if written else 'is there'}; continue with --resume"
        say_stopped(signum, what, speaks=self.ranks.is_main)

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
        norm = nn.utils.clip_grad_norm_(self.trained, config.optim.clip_norm)
        finite = self._send_numbers(losses, norm, parts, rate)
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
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _send_numbers(self, losses: dict[str, Tensor], norm: Tensor, parts: list[Part], rate: float) -> Tensor:
        """Average every loss and the gradient norm over ranks, in one all-reduce; whether all of them are finite."""
        full_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        own = torch.stack([value.float().reshape(()) for value in [*losses.values(), full_norm]])
        means = self.ranks.mean(own.clone())
        keys = [key for part in parts for key in part.batch.keys]
        self.in_flight.send(self.step, keys, rate, [*losses, "grad_norm"], means, own)
        return means.isfinite().all()

    def _settle(
        self, *, everything: bool, throughput: Throughput | None = None, sinks: Sequence[MetricSink] = ()
    ) -> None:
        """Look at the numbers that have come from the device. throughput: this step's go to the `sinks`, with rates."""
        for record in self.in_flight.arrived(everything=everything):
            finite = self.skipped.see(record)
            if throughput is not None and record.step + 1 == self.step:
                values = {name: value for name, value in record.means.items() if finite or math.isfinite(value)}
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

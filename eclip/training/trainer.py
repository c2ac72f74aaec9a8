"""A run in progress: the loop, its checkpoints, and how it stops.

Data order, random draws and the learning rate are pure functions of (seed, step): a resumed run repeats an unbroken
one, and ranks change nothing but the speed.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from eclip.dataloading.schema import Batch
from eclip.dataloading.system.console import say
from eclip.objectives.objective import make_objective
from eclip.parallel.ending import say_stopped
from eclip.parallel.ranks import Ranks
from eclip.parallel.sharding import shard
from eclip.parallel.signals import Stopped, StopSignals
from eclip.training.build import build_model, make_loader, open_cache
from eclip.training.checkpoint import load_checkpoint, load_locked_towers, save_checkpoint
from eclip.training.finite import require_finite
from eclip.training.metrics.sinks import MetricSink
from eclip.training.metrics.throughput import Throughput, count_flops
from eclip.training.momentum import make_momentum, update_momentum
from eclip.training.optim import build_optimizer, learning_rate, set_learning_rate
from eclip.training.prepare import Prepared
from eclip.training.step import TrainStep, use_bf16


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
        self.momentum = make_momentum(self.model) if make_objective(self.config.objective).needs_momentum else None
        self.step_module = TrainStep(self.model, self.momentum, self.config, ranks).train()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if ranks.mesh is not None:
            block_dtype = torch.bfloat16 if use_bf16(self.config, ranks) else None
            shard(self.step_module, ranks.mesh, block_dtype=block_dtype)
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.loader = make_loader(prepared, ranks)
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
        with stop.noted():
            while self.step < config.steps:
                batch = self._next_batch(batches, throughput, stop)
                # A rank told to stop while it waits for data joins here like those that have theirs: none stands in a
                # collective of the step, waiting for one that never comes.
                if signum := self.ranks.highest(stop.signum or 0):
                    stop.signum = signum
                    self._stop(signum)
                    return False
                assert batch is not None
                values = self._take_step(batch, throughput)
                self.step += 1
                done = self.step == config.steps
                if self.step % config.log_every == 0 or done:
                    values |= throughput.report(self.step)
                    for sink in sinks:
                        sink(self.step, values)
                if self.step % config.checkpoint_every == 0 or done:
                    self.save()
        return True

    def _next_batch(self, batches: Iterator[Batch], throughput: Throughput, stop: StopSignals) -> Batch | None:
        """The next batch; None when a stop signal came, which ends the wait for it."""
        try:
            with throughput.waiting(), stop.interrupting():
                return next(batches)
        except Stopped:
            return None

    def _stop(self, signum: int) -> None:
        """Save what no checkpoint holds yet, and say how to continue."""
        written = self.step > self.first_step
        if written:
            self.save()
        if self.step == 0:
            what = "stopped before the first step, nothing to save"
        else:
            what = f"checkpoint of step {self.step} {'written' if written else 'is there'}; continue with --resume"
        say_stopped(signum, what, speaks=self.ranks.is_main)

    def _take_step(self, batch: Batch, throughput: Throughput) -> dict[str, float]:
        """One step on one batch; returns its numbers, means over ranks."""
        assert batch.step == self.step, f"the loader gave batch {batch.step} at step {self.step}"
        # Dropout and the like, should a model have any: the same in a resumed run.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        rate = learning_rate(self.step, self.config.steps, self.config.optim)
        set_learning_rate(self.optimizer, rate)
        batch = batch.to(self.ranks.device)
        features = self.cache.lookup(batch.image_rows, step=self.step, seed=self.config.seed) if self.cache else None

        with count_flops(throughput) if throughput.wants_flops else nullcontext():
            losses = self.step_module(batch, features)
            losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        values = self._gather_numbers(losses, norm)
        require_finite(values, losses, batch, self.config.run_dir, self.ranks)
        self.optimizer.step()
        self.model.clamp_logit_scale()
        self.optimizer.zero_grad(set_to_none=True)
        if self.momentum is not None:
            update_momentum(self.model, self.momentum, self.config.objective.ema_momentum)
        return {**values, "learning_rate": rate}

    def _gather_numbers(self, losses: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        """Means over ranks of every loss and of the gradient norm: one all-reduce."""
        full_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        numbers = [loss.detach().float().reshape(()) for loss in losses.values()] + [full_norm.float().reshape(())]
        means = self.ranks.mean(torch.stack(numbers)).tolist()
        return dict(zip([*losses, "grad_norm"], means, strict=True))

    def describe(self) -> str:
        """The first line of a run."""
        config, index = self.config, self.prepared.index
        device = torch.cuda.get_device_name(self.ranks.device) if self.ranks.device.type == "cuda" else "CPU"
        return (
            f"preset {config.preset} ({config.objective.objective}) on {self.ranks.world_size} x {device}, "
            f"{torch.get_num_threads()} threads | {self.num_parameters / 1e6:.1f}M parameters, "
            f"{self.num_trained / 1e6:.1f}M trained | {index.num_products} products, {index.num_images} images | "
            f"batch {config.global_batch_size} | {config.run_dir}"
        )

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            say(text)

"""Train ECLIP: `python -m eclip.train`, or `torchrun --nproc_per_node=N -m eclip.train` on N devices or CPU ranks.

`prepare` (prepare.py) finds every missing file before anything expensive starts, `Trainer.run` is the loop. A step is
one module (`TrainStep`), so that FSDP sees one forward and one backward. Data order, random draws and the learning rate
are pure functions of (seed, step): a resumed run repeats an unbroken one, and ranks change nothing but the speed.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from .config import RunConfig
from .dataloading.loader import ProductLoader
from .dataloading.schema import Batch
from .dataloading.system.console import say
from .model.eclip import ECLIP
from .objectives.eclip import CachedFeatures, compute_losses
from .parallel.ending import conclude, leave, once, say_stopped
from .parallel.ranks import Ranks, find_ranks, part, shard, start_ranks
from .parallel.signals import Stopped, StopSignals
from .parallel.torchrun import has_launcher, stopped_status
from .presets import parse
from .training.checkpoint import load_checkpoint, load_locked_towers, save_checkpoint
from .training.feature_cache.cache import FeatureCache, cache_folder, single_image_note
from .training.finite import NonFiniteLoss, require_finite
from .training.metrics import MetricSink, Throughput, build_sinks, count_flops
from .training.momentum import is_locked, make_momentum, update_momentum
from .training.optim import build_optimizer, learning_rate, set_learning_rate
from .training.prepare import Prepared, prepare
from .weights.pretrained import load_image_weights, load_text_weights


class CannotStart(ValueError):
    """What the user can repair before training begins; main prints its message alone."""


class TrainStep(nn.Module):
    """Forward of one step: a batch to its losses. The root that FSDP shards: models are used inside `forward` only."""

    def __init__(self, model: ECLIP, momentum: ECLIP | None, config: RunConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.momentum, self.config, self.group = model, momentum, config, ranks.group
        self.autocast = use_bf16(config, ranks)

    def forward(self, batch: Batch, features: CachedFeatures | None) -> dict[str, Tensor]:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            losses = compute_losses(
                self.model,
                self.momentum,
                batch,
                self.config.objective,
                features=features,
                step=batch.step,
                seed=self.config.seed,
                group=self.group,
            )
        return {**losses, "logit_scale": self.model.scale().detach()}

    def train(self, mode: bool = True) -> "TrainStep":
        """Locked parts and the momentum model stay in eval mode."""
        super().train(mode)
        if self.momentum is not None:
            self.momentum.eval()
        for child in self.model.children():
            if is_locked(child):
                child.eval()
        return self


def use_bf16(config: RunConfig, ranks: Ranks) -> bool:
    return config.bf16 and ranks.device.type == "cuda"


def build_model(config: RunConfig, *, pretrained: bool = True) -> ECLIP:
    """The model on CPU, the same on every rank: seeded, pretrained towers loaded, what does not train locked.

    pretrained: False leaves the towers' files alone, for a model that a checkpoint fills.
    """
    torch.manual_seed(config.seed)
    model = ECLIP(config.model)
    if pretrained and config.image_weights is not None:
        load_image_weights(model.image_encoder, config.image_weights, tower=config.image_tower)
    if pretrained and config.text_weights is not None:
        load_text_weights(model.text_encoder, config.text_weights, tower=config.text_tower)
    if config.lock_image:
        model.image_encoder.requires_grad_(False)
    if config.lock_text:
        model.text_encoder.requires_grad_(False)
    if config.objective.objective == "clip":
        for part in (model.queries, model.instance_decoder, model.matching_head):
            part.requires_grad_(False)
    return model


def open_cache(model: ECLIP, prepared: Prepared, ranks: Ranks) -> FeatureCache | None:
    """The cache of the locked towers' outputs, beside the shards: runs on one catalogue share it.

    All ranks fill it together, through the file: nobody waits in a collective meanwhile.
    """
    config = prepared.config
    if not config.cache_features:
        return None
    return FeatureCache.build_or_open(
        cache_folder(config),
        model,
        prepared.index,
        prepared.tokenizer,
        config,
        views=config.cached_views,
        device=ranks.device,
        progress=ranks.is_main,
    )


def stall_limit(config: RunConfig, world_size: int) -> float:
    """Seconds after which a loader without a batch stops the run; 0: never.

    Other ranks wait for this one's batch in a collective, whose error could not name the cause: the loader is earlier.
    """
    limit = config.data.stall_seconds
    return limit if world_size == 1 else min(limit, config.rank_timeout_seconds / 2)


def make_loader(prepared: Prepared, ranks: Ranks) -> ProductLoader:
    config = prepared.config
    return ProductLoader(
        prepared.index,
        prepared.tokenizer,
        global_batch_size=config.global_batch_size,
        image_size=config.model.image_size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        decoder="none" if config.cache_features else config.data.decoder,
        num_workers=config.data.num_workers,
        stall_seconds=stall_limit(config, ranks.world_size),
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        max_tokens=config.data.max_tokens,
    )


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
        eclip = self.config.objective.objective == "eclip"
        self.momentum = make_momentum(self.model) if eclip else None
        self.step_module = TrainStep(self.model, self.momentum, self.config, ranks).train()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if ranks.mesh is not None:
            block_dtype = torch.bfloat16 if use_bf16(self.config, ranks) else None
            shard(self.step_module, ranks.mesh, block_dtype=block_dtype)
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.loader = make_loader(prepared, ranks)
        self.step = self.saved_step = 0
        """Steps done, and those of them that the newest checkpoint holds."""
        if checkpoint is not None:
            state = load_checkpoint(checkpoint.path, self.model, self.momentum, self.optimizer, ranks)
            self.loader.load_state_dict(state["loader"])
            self.step = self.saved_step = state["step"]
        prepared.commit(ranks)
        if checkpoint is not None:
            self._say(f"resumed at step {self.step} from {checkpoint.path}")
        elif self.config.resume:
            self._say(f"--resume: no checkpoint in {self.config.run_dir}, starting at step 0")
        for note in prepared.notes:
            self._say(note)

    def save(self) -> None:
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
        written = self.step > self.saved_step
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


def main(argv: Sequence[str] | None = None) -> int:
    """Train and, at the end, evaluate. Returns the exit status: 0, 1 for an error, 128 + N after signal N.

    A run that stopped by request under torchrun --max-restarts ends with 0 too: anything else starts it again.
    """
    config = once(lambda: parse(argv))
    watch, unfinished = None, "stopped before the first step, nothing to save"
    with StopSignals(repeated_by_launcher=has_launcher()) as stop:
        try:
            watch = find_ranks(timeout=config.rank_timeout_seconds, stop=stop)
            ranks = start_ranks(watch)
            done = train(config, ranks, stop=stop)
            part(ranks)
            watch = None  # from here on rank 0 is alone
            if stop.signum is not None and not done:
                return stopped_status(stop.signum)
            if config.evaluate and ranks.is_main:
                again = f"python -m eclip.evaluate --checkpoint {config.run_dir}"
                unfinished = f"the run is complete, its evaluation is not; repeat that with {again}"
                with stop.interrupting():
                    from .evaluate.run import evaluate_run

                    evaluate_run(config.run_dir, ranks.device)
        except BaseException as error:
            with stop.noted():
                return conclude(error, watch, stop, told=(ValueError, OSError, NonFiniteLoss), stopped=unfinished)
    return 0


if __name__ == "__main__":
    leave(main())

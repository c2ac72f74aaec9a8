"""Train ECLIP: `python -m eclip.train`, or `torchrun --nproc_per_node=N -m eclip.train` on N devices or CPU ranks.

`prepare` (prepare.py) finds every missing file before anything expensive starts, `Trainer.run` is the loop. A step is
one module (`TrainStep`), so that FSDP sees one forward and one backward. Data order, random draws and the learning rate
are pure functions of (seed, step): a resumed run repeats an unbroken one, and ranks change nothing but the speed.
"""

import json
import math
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from .config import RunConfig
from .dataloading.loader import ProductLoader
from .dataloading.schema import Batch
from .feature_cache import FeatureCache, cache_folder
from .metrics import MetricSink, Throughput, build_sinks, count_flops
from .model.eclip import ECLIP
from .model.pretrained import load_image_weights, load_text_weights
from .momentum import is_locked, make_momentum, update_momentum
from .objectives import CachedFeatures, compute_losses
from .optim import build_optimizer, learning_rate, set_learning_rate
from .parallel import Ranks, shard, start_ranks, stop_ranks
from .prepare import Prepared, prepare
from .presets import parse


class CannotStart(ValueError):
    """What the user can repair before training begins; main prints its message alone."""


class NonFiniteLoss(RuntimeError):
    """A loss or the gradient norm is NaN or infinite. The weights are still those before the step."""


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


class Terminated:
    """True once SIGTERM came: the step in progress ends, a checkpoint is written, then the run stops."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Terminated":
        self.previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def sigterm_held() -> Iterator[None]:
    """Deliver SIGTERM after the block. Data workers forked inside inherit that and never see it.

    torchrun and job queues signal the whole process group; a worker that dies of it would fail the run before the
    checkpoint is written. Workers end with their parent.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def use_bf16(config: RunConfig, ranks: Ranks) -> bool:
    return config.bf16 and ranks.device.type == "cuda"


def build_model(config: RunConfig) -> ECLIP:
    """The model on CPU, the same on every rank: seeded, pretrained towers loaded, what does not train locked."""
    torch.manual_seed(config.seed)
    model = ECLIP(config.model)
    if config.image_weights is not None:
        load_image_weights(model.image_encoder, config.image_weights)
    if config.text_weights is not None:
        load_text_weights(model.text_encoder, config.text_weights)
    if config.lock_image:
        model.image_encoder.requires_grad_(False)
    if config.lock_text:
        model.text_encoder.requires_grad_(False)
    if config.objective.objective == "clip":
        for part in (model.queries, model.instance_decoder, model.matching_head):
            part.requires_grad_(False)
    return model


def open_cache(model: ECLIP, prepared: Prepared, ranks: Ranks) -> FeatureCache | None:
    """The cache of the locked towers' outputs, beside the shards: runs on one catalogue share it. Rank 0 fills it."""
    config = prepared.config
    if not config.cache_features:
        return None

    def build() -> FeatureCache:
        return FeatureCache.build_or_open(
            cache_folder(config),
            model,
            prepared.index,
            prepared.tokenizer,
            config,
            views=config.cached_views,
            device=ranks.device,
        )

    cache = build() if ranks.is_main else None
    ranks.barrier()
    return cache or build()


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
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        max_tokens=config.data.max_tokens,
    )


class Trainer:
    """A run in progress: models, optimizer, data. `run` takes the steps."""

    def __init__(self, prepared: Prepared, ranks: Ranks) -> None:
        self.prepared, self.config, self.ranks = prepared, prepared.config, ranks
        self.model = build_model(self.config).to(ranks.device)
        self.cache = open_cache(self.model, prepared, ranks)
        eclip = self.config.objective.objective == "eclip"
        self.momentum = make_momentum(self.model) if eclip else None
        self.step_module = TrainStep(self.model, self.momentum, self.config, ranks).train()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if ranks.mesh is not None:
            block_dtype = torch.bfloat16 if use_bf16(self.config, ranks) else None
            shard(self.step_module, ranks.mesh, block_dtype=block_dtype)
        self.optimizer = build_optimizer(self.model, self.config.optim, fused=ranks.device.type == "cuda")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.loader = make_loader(prepared, ranks)
        self.step = 0
        """Steps done."""
        if self.config.resume:
            self._resume()

    def _resume(self) -> None:
        path = newest_checkpoint(self.config.run_dir)
        if path is None:
            self._say(f"--resume: no checkpoint in {self.config.run_dir}, starting at step 0")
            return
        state = load_checkpoint(path, self.model, self.momentum, self.optimizer, self.ranks)
        self.loader.load_state_dict(state["loader"])
        self.step = state["step"]
        self._say(f"resumed at step {self.step} from {path}")

    def save(self) -> None:
        save_checkpoint(
            self.config.run_dir,
            self.step,
            self.model,
            self.momentum,
            self.optimizer,
            {"loader": self.loader.state_dict()},
            self.ranks,
            keep=self.config.keep_checkpoints,
        )

    def run(self, sinks: Sequence[MetricSink]) -> bool:
        """Step to config.steps, calling `sinks` every log_every steps. True when done, False after SIGTERM."""
        config, start = self.config, self.step
        throughput = Throughput(config.steps, start, config.global_batch_size, self.ranks.device)
        batches = iter(self.loader) if start < config.steps else None
        with Terminated() as terminated:
            while batches is not None and self.step < config.steps:
                with throughput.waiting(), sigterm_held():
                    batch = next(batches)
                values, stop = self._take_step(batch, throughput, terminated)
                self.step += 1
                done = self.step == config.steps
                if self.step % config.log_every == 0 or done:
                    values |= throughput.report(self.step)
                    for sink in sinks:
                        sink(self.step, values)
                if self.step % config.checkpoint_every == 0 or done or stop:
                    self.save()
                if stop and not done:
                    self._say(f"SIGTERM: checkpoint of step {self.step} written; continue with --resume")
                    return False
        return True

    def _take_step(self, batch: Batch, throughput: Throughput, terminated: Terminated) -> tuple[dict[str, float], bool]:
        """One step on one batch; returns its numbers (means over ranks) and whether a rank was told to stop."""
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
        values, stop = self._gather_numbers(losses, norm, terminated.requested)
        self._require_finite(values, losses, batch)
        self.optimizer.step()
        self.model.clamp_logit_scale()
        self.optimizer.zero_grad(set_to_none=True)
        if self.momentum is not None:
            update_momentum(self.model, self.momentum, self.config.objective.ema_momentum)
        return {**values, "learning_rate": rate}, stop

    def _gather_numbers(self, losses: dict[str, Tensor], norm: Tensor, stop: bool) -> tuple[dict[str, float], bool]:
        """Means over ranks of every loss and of the gradient norm, and whether a rank got SIGTERM: one all-reduce."""
        full_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        numbers = [loss.detach().float().reshape(()) for loss in losses.values()] + [full_norm.float().reshape(())]
        vector = torch.stack([*numbers, torch.tensor(float(stop), device=self.ranks.device)])
        *means, stops = self.ranks.mean(vector).tolist()
        return dict(zip([*losses, "grad_norm"], means, strict=True)), stops > 0

    def _require_finite(self, values: dict[str, float], losses: dict[str, Tensor], batch: Batch) -> None:
        if all(math.isfinite(value) for value in values.values()):
            return
        path = self.config.run_dir / f"nonfinite_step{self.step}_rank{self.ranks.rank}.json"
        own = {name: float(loss.detach()) for name, loss in losses.items()}
        path.write_text(json.dumps({"step": self.step, "mean": values, "rank": own, "keys": batch.keys}, indent=1))
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        shown = ", ".join(batch.keys[:8]) + (", ..." if len(batch.keys) > 8 else "")
        raise NonFiniteLoss(
            f"step {self.step}: {numbers}. Images of rank {self.ranks.rank}: {shown} ({len(batch.keys)} in {path}). "
            f"The newest checkpoint is from before; lower --learning-rate or --clip-norm, or use --no-bf16"
        )

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
            print(text, flush=True)


def train(config: RunConfig, ranks: Ranks, *, sinks: Sequence[MetricSink] = ()) -> bool:
    """Prepare and train; `sinks` are called beside the configured ones. True when done, False when SIGTERM came first.

    Raises CannotStart (a ValueError) before the first step, NonFiniteLoss after it. Holds no model when it returns.
    """
    try:
        prepared = prepare(config, ranks)
        trainer = Trainer(prepared, ranks)
    except (ValueError, OSError) as error:
        raise CannotStart(str(error)) from error
    if ranks.is_main:
        print(trainer.describe(), flush=True)
        sinks = [*build_sinks(prepared.config, start_step=trainer.step), *sinks]
    return trainer.run(sinks if ranks.is_main else ())


def main(argv: Sequence[str] | None = None) -> int:
    """Train and, at the end, evaluate. Returns the exit status: 0, 1 for an error, 143 after SIGTERM."""
    config = parse(argv)
    ranks = start_ranks()
    is_main, device = ranks.is_main, ranks.device
    try:
        status = 0 if train(config, ranks) else 128 + signal.SIGTERM
    except (CannotStart, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 1
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold the models, which must go before the group does
        raise
    finally:
        stop_ranks()
    if status == 0 and config.evaluate and is_main:
        from .evaluate.run import evaluate_run

        evaluate_run(config.run_dir, device)
    return status


if __name__ == "__main__":
    sys.exit(main())

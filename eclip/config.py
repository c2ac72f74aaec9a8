"""Every setting of a run: frozen dataclasses, one validation place each.

What a room of its own is about stands there: `ModelConfig` in model/settings.py, `ObjectiveConfig` in
objectives/settings.py, `ComputeConfig` in parallel/settings.py. Here are the data's, the optimizer's and the run's,
which holds them all.

presets.py holds complete sets of them and reads command-line flags. The resolved configuration is saved as
`config.json` in the run folder, so that evaluation and resume need no flags.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from .dataloading.schedule import BatchSchedule
from .model.settings import ModelConfig
from .objectives.settings import ObjectiveConfig
from .parallel.settings import ComputeConfig
from .setting_rules import (
    ONE_OR_MORE,
    POSITIVE,
    ZERO_OR_MORE,
    Rule,
    check_settings,
    flag,
    from_record,
    require,
)

PresetName = Literal["demo", "demo_towers", "shop", "shop_gpu", "vit_b16", "vit_l16", "debug"]

_BETA = Rule(low=0, high=1, below_high=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where batches come from."""

    data_dir: Path = Path("data/demo")
    """Folder of packed shards (train-*.tar, val-*.tar, test-*.tar). The demo presets pack the embedded catalogue into
    their own folder; any other folder must hold shards already."""
    demo_image_size: int = 160
    """Side of the embedded catalogue's composed images, pixels."""
    demo_images_per_product: int = 40
    """Composed images of each product."""
    demo_products: int | None = None
    """Pack only so many products of the embedded catalogue."""
    decoder: Literal["auto", "dali", "torch"] = "auto"
    """JPEG decode and augmentation: DALI, or a DCT-scaled decode in workers; auto takes the faster installed."""
    num_workers: int = 1
    """Processes of each rank that decode; 0: the training process does."""
    stall_seconds: int = 300
    """How long a batch may take before the run stops and says what its data workers do; 0: without limit."""
    max_tokens: int = 55
    """Titles are cut to so many pieces, begin and end ([CLS] and [SEP]) among them; SigLIP's are padded to as many."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area share of the random resized crop."""
    flip: bool = True
    """Mirror half of the images."""

    RULES: ClassVar[dict[str, Rule]] = {
        "demo_image_size": Rule(low=32, high=512, why="the embedded views have 192 px"),
        "demo_images_per_product": Rule(low=2, why="pairs need images of two sources"),
        "demo_products": Rule(low=20, why="fewer leave a split without distractors"),
        **dict.fromkeys(("num_workers", "stall_seconds"), ZERO_OR_MORE),
        "max_tokens": Rule(low=3, why="[CLS], one piece and [SEP] need 3"),
    }

    def __post_init__(self) -> None:
        check_settings(self, self.RULES)
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"crop_scale={self.crop_scale}: area shares of the image, the smallest first; "
            f"set {flag('crop_scale')} to two numbers with 0 < smallest <= largest <= 1",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "apex_adam", "muon"] = "adamw"
    """PyTorch's fused AdamW, NVIDIA apex's FusedAdam where it is built in, or Muon for the matrices of the blocks and
    AdamW for the rest."""
    learning_rate: float = 1e-4
    """The highest, after the warm-up."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """With --batch-schedule: the rate is that of the largest batch; a step with a share s of it takes 1, sqrt(s) or s
    times as much."""
    tower_learning_rate_scale: float = 1.0
    """Factor on the learning rate of both towers (slowly tuned pretrained ones)."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block of a tower to the one below it (BEiT, MAE)."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How it falls to 0 afterwards."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""

    RULES: ClassVar[dict[str, Rule]] = {
        **dict.fromkeys(("learning_rate", "clip_norm"), POSITIVE),
        "layer_decay": Rule(low=0, high=1, above_low=True),
        **dict.fromkeys(("tower_learning_rate_scale", "weight_decay", "warmup_steps"), ZERO_OR_MORE),
        **dict.fromkeys(("beta1", "beta2"), _BETA),
    }

    def __post_init__(self) -> None:
        check_settings(self, self.RULES)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    # The run.
    preset: PresetName = "demo"
    """Where every value below starts; other flags override it."""
    run_dir: Path = Path("runs/demo")
    """Folder of all that the run writes."""
    seed: int = 0
    """Of weights, data order, crops and prompts."""
    resume: bool = False
    """Continue from the newest whole checkpoint of run_dir (from step 0 when there is none)."""
    overwrite: bool = False
    """Without --resume: delete what an earlier run wrote to run_dir instead of refusing (runs/debug needs no flag)."""

    # How many steps of which size.
    steps: int = 1000
    """Optimizer steps in all; 0, with --start-from, trains nothing."""
    epochs: float | None = None
    """Passes over the catalogue, instead of --steps: the steps are computed from its size at the start."""
    fit_steps: bool = False
    """Compute the steps from the number of products: 30 passes, 10,000 steps at most."""
    fit_warmup: bool = False
    """Compute the warm-up from the steps: a twentieth."""
    global_batch_size: int = 64
    """Products of a step, over all ranks."""
    fit_batch: int = 0
    """Instead, a quarter of the products as a power of two, from 16 to this number; 0: as --global-batch-size says."""
    batch_schedule: str | None = None
    """Instead, sizes from given steps on, e.g. 0:1024,2000:4096."""
    micro_batch: int | None = None
    """Products that a rank takes at a time: memory is that of so many, gradients are exactly the global batch's, for
    one more forward pass of the encoders. None: a rank's whole share at once."""

    # Where weights begin, and which of them learn.
    start_from: Path | None = None
    """A trained ECLIP, run folder or export: its weights, tokenizer and model settings; optimizer and steps are new."""
    image_weights: Path | None = None
    """Local safetensors file that initialises the image tower: a ViT or DINOv2 (Hugging Face or timm names), or a CLIP
    or SigLIP (Hugging Face, OpenAI or open_clip), which tells the model's shapes itself."""
    text_weights: Path | None = None
    """The same for the text tower: a BERT (Hugging Face names), or a CLIP or SigLIP, whose two towers may lie in one
    file."""
    image_tower: str | None = None
    """Which tower of an --image-weights file of several: the beginning of its tensors' names (student, teacher)."""
    text_tower: str | None = None
    """The same of --text-weights."""
    vocab_file: Path | None = None
    """BERT's vocab.txt, or the tokenizer.json of a CLIP, SigLIP or BERT; without it WordPiece is trained on the
    catalogue's text."""
    cased: bool = False
    """The vocabulary has capitals and accents: leave titles as they are instead of lower-casing them."""
    lock_image: bool = False
    """Keep the image tower's weights; only what follows it is trained."""
    lock_text: bool = False
    """Keep the text tower's weights."""
    unlock_last: int = 0
    """Of a locked tower, train the last N blocks and what follows them all the same."""
    cache_features: bool = False
    """With a locked image tower: compute its features once into a memory map and train from them."""
    cached_views: int = 1
    """Augmented views of each image in the feature cache."""

    # What is saved, and what is measured.
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written after the last step and at SIGTERM, SIGINT and SIGUSR1."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    async_checkpoints: bool = False
    """Write checkpoints in the background, from a copy in host memory, while training goes on."""
    validate_every: int = 0
    """Steps between losses of the val split, and one at the end; the checkpoint with the lowest is kept beside the
    newest. 0: never."""
    evaluate: bool = True
    """Evaluate on the test split when training ends."""
    log_every: int = 10
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Also write TensorBoard events to run_dir (needs the package tensorboard)."""
    wandb: str | None = None
    """Also send metrics to this Weights & Biases project (needs the package wandb)."""
    profile: bool = False
    """Trace steps 6 to 10 of a start (the last five of a shorter one) into run_dir/profile: a chrome trace, a table."""

    # Precision, and what ends a run.
    bf16: bool = True
    """bfloat16 autocast on GPU; CPU runs stay in float32."""
    max_nonfinite_steps: int = 10
    """A step whose loss or gradient is NaN or infinite is skipped; more than so many in a row end the run."""
    rank_timeout_seconds: int = 600
    """How long the ranks wait for a silent one in a collective before the run stops and names it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    RULES: ClassVar[dict[str, Rule]] = {
        **dict.fromkeys(("checkpoint_every", "log_every", "cached_views", "rank_timeout_seconds"), ONE_OR_MORE),
        "global_batch_size": Rule(low=2, why="contrast needs two products"),
        "epochs": POSITIVE,
        "steps": ZERO_OR_MORE,
        "fit_batch": ZERO_OR_MORE,
        "micro_batch": ONE_OR_MORE,
        **dict.fromkeys(("validate_every", "max_nonfinite_steps", "unlock_last"), ZERO_OR_MORE),
        "seed": Rule(low=0, high=2**32 - 1),
        "keep_checkpoints": Rule(low=1, why="at least the newest stays"),
    }

    def __post_init__(self) -> None:
        check_settings(self, self.RULES)
        require(
            self.steps > 0 or self.start_from is not None,
            "steps=0: nothing would be trained; set --steps to 1 or more (0 keeps the weights of a --start-from)",
        )
        require(
            self.batch_schedule is not None or self.optim.lr_scaling == "none",
            f"--lr-scaling {self.optim.lr_scaling} without --batch-schedule: every step has the largest batch; leave "
            f"it out, or give a schedule",
        )
        require(
            self.epochs is None or not self.fit_steps,
            f"--epochs {self.epochs} with --fit-steps: both say how long to train; give one of them (--no-fit-steps)",
        )
        require(
            self.batch_schedule is None or not self.fit_batch,
            f"--batch-schedule {self.batch_schedule} with --fit-batch {self.fit_batch}: both say how large a step is; "
            f"give one of them (--fit-batch 0)",
        )
        require(
            self.lock_image or not self.cache_features,
            "--cache-features needs --lock-image: features of a tower that trains go stale",
        )
        require(
            not self.unlock_last or self.lock_image or self.lock_text,
            f"--unlock-last {self.unlock_last} without --lock-image or --lock-text: every block trains already",
        )
        require(
            not (self.unlock_last and self.cache_features),
            f"--unlock-last {self.unlock_last} with --cache-features: the cache holds what the locked tower gives, and "
            f"its last blocks would train; use --no-cache-features",
        )
        self.schedule  # noqa: B018 (raises for a schedule that cannot be read)
        require(self.wandb != "", "wandb='': give the project's name, --wandb NAME")
        require(
            self.text_weights is None or self.vocab_file is not None,
            f"--text-weights {self.text_weights} without --vocab-file: the rows of its embedding are the pieces of its "
            f"own vocabulary; give that model's vocab.txt or tokenizer.json",
        )
        require(
            self.model.text_architecture != "siglip" or self.data.max_tokens == self.model.max_positions,
            f"max_tokens={self.data.max_tokens} with max_positions={self.model.max_positions}: SigLIP's text tower is "
            f"trained on texts that are all padded to one length; set --max-tokens and --max-positions to one number",
        )
        require(
            self.vocab_file is not None or not self.cased,
            "--cased without --vocab-file: a vocabulary learnt from the catalogue is lower-case; give --vocab-file",
        )
        for name in ("image_weights", "text_weights", "vocab_file"):
            require(
                self.start_from is None or getattr(self, name) is None,
                f"{flag(name)} {getattr(self, name)} with --start-from {self.start_from}: that run brings its weights "
                f"and its vocabulary; leave one of the two out",
            )
        for name in ("image", "text"):
            require(
                getattr(self, f"{name}_tower") is None or getattr(self, f"{name}_weights") is not None,
                f"--{name}-tower {getattr(self, f'{name}_tower')} without --{name}-weights: it says which tower of "
                f"that file is meant",
            )
        require(
            self.data.max_tokens <= self.model.max_positions,
            f"max_tokens={self.data.max_tokens} exceeds max_positions={self.model.max_positions}; "
            f"lower --max-tokens or raise --max-positions",
        )

    @property
    def schedule(self) -> BatchSchedule:
        """The size of every step's global batch."""
        if self.batch_schedule is None:
            return BatchSchedule.constant(self.global_batch_size)
        return BatchSchedule.parse(self.batch_schedule)

    def check_files(self, *, resumed: bool = False) -> None:
        """Raise ValueError for a file that a flag names and that is not there: before training, not in its middle.

        Not part of construction: a finished run is also opened on machines that hold only its run folder. resumed: the
        run folder has the weights and the vocabulary, the files need not be there any more.
        """
        for name in () if resumed else ("image_weights", "text_weights", "vocab_file"):
            path = getattr(self, name)
            hint = ""
            if self.preset == "demo_towers":
                hint = "; `make towers/ready` fetches the towers of this preset, --preset demo trains without them"
            require(path is None or path.is_file(), f"--{name.replace('_', '-')} {path}: no such file{hint}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """The inverse of `to_json`. Raises ValueError for what is not JSON, unknown keys and values out of range."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
        config = from_record(cls, record)
        assert isinstance(config, cls)
        return config

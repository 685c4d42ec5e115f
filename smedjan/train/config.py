"""The configuration of a fine-tuning run: the flags of `smedjan finetune` and the keys of its TOML file.

    FinetuneConfig.from_toml("run.toml", {"optim.lr": "2e-4"})      the file, and flags over it

Paths are relative to the working directory, in the file as in flags.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from smedjan.data.files import OnBroken
from smedjan.errors import ConfigError, nearest
from smedjan.train.flags import Flag, Section, flags_of, listed, read
from smedjan.train.optimizers import RATES, defaults

Method = Literal["full", "lora", "qlora"]

LEARNING_RATES: dict[Method, float] = {"lora": 5e-4, "qlora": 5e-4, "full": 5e-5}
"""Used where `optim.lr` is not given, times the optimizer's of `RATES`. LoRA's best rate is about ten times that of
full fine-tuning, at any rank, since its output is scaled by alpha / rank (Schulman et al. 2025, "LoRA Without Regret").
Both fall as a model gets wider: these suit one to eight billion parameters, and SmolLM2-135M still trains well at
1e-3."""

DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How much is trained, on what."""

    section: ClassVar[str] = "train."

    steps: int | None = field(default=None, metadata={"ge": 1, "help": "optimizer steps; give this or epochs"})
    epochs: float | None = field(default=None, metadata={"gt": 0, "help": "passes over the data (default 1)"})
    batch_size: int = field(default=8, metadata={"ge": 1, "help": "rows of one micro-batch"})
    grad_accum: int = field(default=1, metadata={"ge": 1, "help": "micro-batches of one step"})
    max_length: int | None = field(
        default=None,
        metadata={"ge": 2, "help": f"most tokens of a row (default {DEFAULT_MAX_LENGTH}, or the model's context)"},
    )
    packing: bool = field(default=False, metadata={"help": "put several rows into one, each seeing only itself"})
    loss_on: Literal["completion", "last", "all"] = field(
        default="completion", metadata={"help": "train completions and assistant turns, the last turn, or every token"}
    )
    too_long: Literal["error", "truncate", "drop"] = field(
        default="error", metadata={"help": "what to do with a row longer than max-length"}
    )
    broken: OnBroken = field(
        default="error", metadata={"help": "what to do with a row that cannot be read: end there, or leave it out"}
    )
    save_every: int = field(default=100, metadata={"ge": 0, "help": "steps between checkpoints; 0: only at the end"})
    keep: int = field(default=2, metadata={"ge": 1, "help": "the newest checkpoints that stay"})
    eval_every: int = field(default=100, metadata={"ge": 0, "help": "steps between evaluations; 0: only at the end"})
    sample_every: int = field(default=0, metadata={"ge": 0, "help": "steps between sample generations; 0: none"})
    sample_prompts: str | None = field(
        default=None,
        metadata={"help": "a prompt, or a file of them (default: of the first rows of eval data, or data)"},
    )
    track: tuple[str, ...] | None = field(
        default=None, metadata={"help": "who else gets the log: tensorboard, trackio, wandb, by commas"}
    )
    attention: Literal["sdpa", "eager"] = field(
        default="sdpa", metadata={"help": "which of transformers' two computations the exact backend repeats"}
    )
    ema: float | None = field(
        default=None, metadata={"gt": 0, "lt": 1, "help": "decay of a mean of the weights, which the result has then"}
    )
    patience: int | None = field(
        default=None, metadata={"ge": 1, "help": "evaluations without a lower loss that end a run; it keeps the best"}
    )
    min_delta: float = field(default=0.0, metadata={"ge": 0, "help": "by how much a loss must be lower to count"})
    memory: str | None = field(
        default=None, metadata={"help": "of the device, such as 24GB: what does not fit is recomputed or offloaded"}
    )
    fp8: bool = field(default=False, metadata={"help": "the blocks' linear layers in 8-bit floats (full, cuda_triton)"})
    int8_forward: bool = field(
        default=False, metadata={"help": "forward products of the frozen base in 8-bit integers (lora, cpu_native)"}
    )
    freeze: tuple[str, ...] | None = field(
        default=None, metadata={"help": "parts of names that are not trained, such as embed_tokens,layers.0 (full)"}
    )
    only: tuple[str, ...] | None = field(
        default=None, metadata={"help": "parts of names that alone are trained, such as layers.29,norm (full)"}
    )
    new_tokens: tuple[str, ...] | None = field(
        default=None, metadata={"help": "tokens to add, by commas, or @FILE with one a line; their rows are trained"}
    )
    z_loss: float = field(
        default=0.0, metadata={"ge": 0, "help": "weight of the squared log-normaliser in training's loss, such as 1e-4"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"ge": 0, "lt": 1, "help": "share of each target that goes to all tokens alike"}
    )
    neftune: float = field(
        default=0.0, metadata={"ge": 0, "help": "alpha of uniform noise on the embeddings, such as 5"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "new_tokens", listed(self.new_tokens, "train.new_tokens"))
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"both steps ({self.steps}) and epochs ({self.epochs:g}) are given",
                field="train.steps",
                remedy="give --train.steps or --train.epochs",
            )
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1.0)

    def max_length_for(self, context: int) -> int:
        """Most tokens of a row, for a model of that context (`max_position_embeddings`)."""
        if self.max_length is None:
            return min(DEFAULT_MAX_LENGTH, context)
        if self.max_length > context:
            raise ConfigError(
                f"{self.max_length} is more than the model's context of {context} tokens",
                field="train.max_length",
                remedy=f"give --train.max-length {context} or less",
            )
        return self.max_length


def _pairs(pattern: tuple[str, ...] | None, name: str, flag: Flag) -> Iterator[tuple[str, Any]]:
    """(name, value) of each NAME=VALUE of the field `name`; the value is one that the flag could have."""
    seen = set()
    for pair in pattern or ():
        module, _, value = (part.strip() for part in pair.partition("="))
        if not module or not value:
            raise ConfigError(f"{pair!r} is not NAME=NUMBER", field=name, remedy="give such as q_proj=8")
        if module in seen:
            raise ConfigError(f"{module} is there twice", field=name, remedy="keep one")
        seen.add(module)
        yield module, read(value, flag, name)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer and its schedule."""

    section: ClassVar[str] = "optim."

    name: Literal["adamw", "muon", "lion", "adafactor", "sophia"] = field(
        default="adamw", metadata={"help": "optimizer; muon takes AdamW for what is no matrix of a hidden layer"}
    )
    lr: float | None = field(
        default=None,
        metadata={"gt": 0, "help": "peak learning rate (default by method and optimizer: adamw's 5e-4, 5e-5 for full)"},
    )
    adamw_lr: float | None = field(
        default=None, metadata={"gt": 0, "help": "of what muon leaves to AdamW (default lr)"}
    )
    lr_pattern: tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "factors of the rate of some parameters: embed_tokens=0.1, or LoRA+, lora_B=16"},
    )
    weight_decay: float = field(default=0.0, metadata={"ge": 0, "help": "decoupled weight decay"})
    master: bool = field(
        default=True, metadata={"help": "keep float32 copies of narrower weights, which the steps go to"}
    )
    state: Literal["same", "float32", "bfloat16", "8bit"] = field(
        default="same", metadata={"help": "dtype of both moments; same: that of what the steps go to"}
    )
    rounding: Literal["nearest", "stochastic"] = field(
        default="nearest", metadata={"help": "of bfloat16 weights that have no master"}
    )
    clip: float = field(default=1.0, metadata={"ge": 0, "help": "the most the global gradient norm may be; 0: any"})
    max_skipped: int = field(
        default=10, metadata={"ge": 1, "help": "steps in a row without a finite gradient norm that end a run"}
    )
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt", "wsd"] = field(
        default="cosine", metadata={"help": "what follows the warm-up"}
    )
    cycles: int = field(default=1, metadata={"ge": 1, "help": "falls to zero of cosine_with_restarts"})
    warmup: float = field(
        default=0.03, metadata={"ge": 0, "help": "steps of warm-up if 1 or more, a share of all steps if less"}
    )
    beta1: float | None = field(
        default=None, metadata={"ge": 0, "lt": 1, "help": "decay of the first moment (default 0.9; sophia 0.965)"}
    )
    beta2: float | None = field(
        default=None,
        metadata={"ge": 0, "lt": 1, "help": "decay of the second moment (default 0.999; lion and sophia 0.99)"},
    )
    eps: float | None = field(
        default=None, metadata={"gt": 0, "help": "added to the root of AdamW's second moment (default 1e-8)"}
    )
    momentum: float | None = field(default=None, metadata={"ge": 0, "lt": 1, "help": "of muon (default 0.95)"})
    muon_adjust: Literal["original", "match_rms_adamw"] | None = field(
        default=None, metadata={"help": "how a matrix's shape scales muon's rate (default match_rms_adamw)"}
    )
    rho: float | None = field(default=None, metadata={"gt": 0, "help": "of sophia: larger clips less (default 0.04)"})
    hessian_every: int | None = field(
        default=None, metadata={"ge": 1, "help": "steps between sophia's estimates of the Hessian (default 10)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= 1 and not self.warmup.is_integer():
            raise ConfigError(
                f"{self.warmup:g} is neither a share below 1 nor a whole number of steps",
                field="optim.warmup",
                remedy=f"give --optim.warmup {round(self.warmup)}",
            )
        _ = self.rates
        for key, value in defaults(self.name, vars(self)).items():
            object.__setattr__(self, key, value)
        if self.adamw_lr is not None and self.name != "muon":
            raise ConfigError("is for muon", field="optim.adamw_lr", remedy="give --optim.lr")
        if self.muon_adjust == "original" and self.lr is None:
            raise ConfigError(
                "muon's original rate has no default beside AdamW's",
                field="optim.lr",
                remedy="give --optim.lr, such as 1e-3, and --optim.adamw-lr",
            )
        if self.cycles > 1 and self.schedule != "cosine_with_restarts":
            raise ConfigError(
                f"{self.cycles} cycles of the schedule {self.schedule}",
                field="optim.cycles",
                remedy="give --optim.schedule cosine_with_restarts",
            )

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """(name, factor) of `lr_pattern`."""
        return tuple(_pairs(self.lr_pattern, "optim.lr_pattern", flags_of(OptimConfig)["lr"]))

    def warmup_steps(self, total: int) -> int:
        """Warm-up steps of a run of `total`; a share is rounded up, as transformers does."""
        steps = int(self.warmup) if self.warmup >= 1 else ceil(self.warmup * total)
        if steps > total:
            raise ConfigError(
                f"{steps} steps of warm-up in a run of {total}",
                field="optim.warmup",
                remedy="give fewer, or a share below 1",
            )
        return steps


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters: y = W x + s B A dropout(x), s = alpha / rank, or alpha / sqrt(rank) with rslora."""

    section: ClassVar[str] = "lora."

    rank: int = field(default=16, metadata={"ge": 1, "help": "rank of A and B"})
    alpha: float = field(default=32.0, metadata={"gt": 0, "help": "the adapter's output is scaled by alpha / rank"})
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(rank): for ranks of 64 and more"})
    dora: bool = field(
        default=False, metadata={"help": "learn the length of each row of a weight apart from its direction (DoRA)"}
    )
    rank_pattern: tuple[str, ...] | None = field(
        default=None, metadata={"help": "other ranks of some modules, such as q_proj=8,layers.3.mlp.up_proj=32"}
    )
    alpha_pattern: tuple[str, ...] | None = field(default=None, metadata={"help": "other alphas of some modules"})
    dropout: float = field(default=0.0, metadata={"ge": 0, "lt": 1, "help": "share of the inputs set to 0"})
    # With adapters on attention alone LoRA falls behind full fine-tuning, even at a higher rank (Schulman et al. 2025).
    targets: tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "names of the modules that get an adapter, by commas (default all linear ones)"},
    )
    bits: int | None = field(
        default=None, metadata={"help": "of the weights under the adapters of qlora: 4 (nf4, the default) or 8 (int8)"}
    )
    init: str = field(
        default="random",
        metadata={"help": "what they start as; pissa: the weight's principal part (pissa_niter_4: nearly, and faster)"},
    )
    modules_to_save: tuple[str, ...] | None = field(
        default=None, metadata={"help": "trained whole beside the adapters: embed_tokens,lm_head"}
    )
    last_layers: int | None = field(
        default=None,
        metadata={"ge": 1, "help": "adapters in the last N layers alone: the others need no backward (default all)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"random|pissa(_niter_\d{1,3})?", self.init):
            raise ConfigError(
                f"{self.init!r} is no start", field="lora.init", remedy="give random, pissa or pissa_niter_4"
            )
        if self.bits not in (None, 4, 8):
            raise ConfigError(f"{self.bits} is neither 4 nor 8", field="lora.bits", remedy="give 4 or 8")
        _ = self.ranks, self.alphas

    @property
    def ranks(self) -> tuple[tuple[str, int], ...]:
        """(name, rank) of `rank_pattern`."""
        return tuple(_pairs(self.rank_pattern, "lora.rank_pattern", flags_of(LoraConfig)["rank"]))

    @property
    def alphas(self) -> tuple[tuple[str, float], ...]:
        """(name, alpha) of `alpha_pattern`."""
        return tuple(_pairs(self.alpha_pattern, "lora.alpha_pattern", flags_of(LoraConfig)["alpha"]))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Section):
    """A run of `smedjan finetune`."""

    model: str = field(metadata={"help": "model directory, run directory or hub id"})
    data: Path = field(
        metadata={"help": "rows to train on: jsonl, json, csv, parquet, arrow, a folder of splits, or a hub data set"}
    )
    eval_data: Path | None = field(default=None, metadata={"help": "rows to evaluate on while training"})
    out: Path | None = field(default=None, metadata={"help": "run directory to write (a dry run needs none)"})
    method: Method = field(
        default="lora", metadata={"help": "what is trained; qlora: adapters of 4-bit or 8-bit weights"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in out"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan and its memory, train nothing"})
    seed: int = field(default=0, metadata={"ge": 0, "lt": 2**63, "help": "of data order, adapters and dropout"})
    backend: Literal["auto", "torch_reference", "cpu_native", "cuda_triton", "mlx_metal"] = field(
        default="auto", metadata={"help": "what runs it"}
    )
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "of the computation (default: as the weights are stored)"}
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.patience is not None and self.eval_data is None:
            raise ConfigError("needs rows to evaluate on", field="train.patience", remedy="give --eval-data FILE")
        if self.out is None and not self.dry_run:
            raise ConfigError("is missing", field="out", remedy="give --out DIR, or --dry-run")
        if self.method == "qlora" and self.lora.bits is None:
            object.__setattr__(self, "lora", replace(self.lora, bits=4))
        if self.method != "qlora" and self.lora.bits is not None:
            raise ConfigError(
                f"{self.lora.bits} bits with the method {self.method}",
                field="lora.bits",
                remedy="give --method qlora, or leave it out",
            )
        if self.optim.lr is None:
            object.__setattr__(
                self, "optim", replace(self.optim, lr=LEARNING_RATES[self.method] * RATES[self.optim.name])
            )

    @property
    def storage(self) -> str | None:
        """What the weights under adapters are held as, if not as they are."""
        return {4: "nf4", 8: "int8"}[self.lora.bits] if self.lora.bits is not None else None

    @property
    def learning_rate(self) -> float:
        """`optim.lr`, which is never None here."""
        assert self.optim.lr is not None
        return self.optim.lr

    @classmethod
    def from_toml(
        cls,
        path: str | PathLike[str] | None,
        overrides: Mapping[str, object] | None = None,
        *,
        kept: Path | None = None,
    ) -> FinetuneConfig:
        """The config of a TOML file (None: of flags alone), and flags over it; both over the flags `kept` of a run.

        `overrides` maps dotted names ("optim.lr") to values, as typed or already converted; None is a flag that was not
        given. Dashes and underscores are the same in both. A flag `train.steps` replaces `epochs` of what is below too,
        and the other way round. Raises ConfigError for a key that is unknown, there twice, missing or out of range.
        """
        layers: list[tuple[Path | None, dict[str, object]]] = []
        if kept is not None:
            from smedjan.models.config import read_json_object

            layers.append((kept, named(read_json_object(kept), file=kept)))
        if path is not None:
            layers.append((Path(path), named(read_toml(Path(path)), file=Path(path))))
        layers.append((None, named(overrides or {}, file=None)))
        values: dict[str, Any] = {}
        source: dict[str | None, Path | None] = {}
        for file, found in layers:
            for flag, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
                if flag in found:
                    values.pop(other, None)
            values |= found
            source |= dict.fromkeys(found, file)
        try:
            for name in ("model", "data"):
                if name not in values:
                    raise ConfigError("is missing", field=name, remedy=f"give --{name}")
            top = {key: value for key, value in values.items() if "." not in key}
            sections = {
                name: section(**{key: values[full] for key in flags_of(section) if (full := f"{name}.{key}") in values})
                for name, section in _SECTIONS.items()
            }
            return cls(**top, **sections)
        except ConfigError as error:
            if source.get(error.field) is None:
                raise
            raise ConfigError(
                error.message, file=source[error.field], field=error.field, remedy=error.remedy
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Nested, as JSON can say it; `from_toml(None, config.to_dict())` is the same config."""
        return _jsonable(asdict(self))

    def decided(self) -> dict[str, Any]:
        """What decides the numbers, of `to_dict`. Paths, the backend, and when to save, evaluate and resume are not in
        it: a run may go on elsewhere."""
        decided = self.to_dict()
        for name in ("model", "data", "eval_data", "out", "resume", "dry_run", "backend"):
            del decided[name]
        # Patience makes of when, and by how much, something that decides the weights.
        watch = ("eval_every", "min_delta") if self.train.patience is None else ()
        for name in ("save_every", "keep", "memory", "sample_every", "sample_prompts", "track", *watch):
            del decided["train"][name]
        del decided["optim"]["max_skipped"]
        if self.method == "full":
            del decided["lora"]
        return decided

    def config_hash(self) -> str:
        """sha256 of `decided`: on the same weights, rows and backend, two runs of one hash make the same weights."""
        return sha256(json.dumps(self.decided(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_SECTIONS: dict[str, type[Any]] = {"train": TrainConfig, "optim": OptimConfig, "lora": LoraConfig}


def flags() -> dict[str, Flag]:
    """Every flag by its dotted name as it is typed ("train.batch-size")."""
    found = dict(flags_of(FinetuneConfig))
    for name, section in _SECTIONS.items():
        found |= {f"{name}.{key}": flag for key, flag in flags_of(section).items()}
    return {key.replace("_", "-"): flag for key, flag in found.items()}


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path, remedy="check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not TOML: {error}", file=path, remedy="repair that line") from error


def named(tables: Mapping[str, object], *, file: Path | None, prefix: str = "") -> dict[str, object]:
    """Dotted snake_case names to values, without None; a table is the same as dotted keys. Refuses what is unknown or
    there twice."""
    known = [name.replace("-", "_") for name in flags()]
    made: dict[str, object] = {}
    for key, value in tables.items():
        name = f"{prefix}{key}".replace("-", "_")
        if name in known:
            found = {} if value is None else {name: value}
        elif name in _SECTIONS and isinstance(value, Mapping):
            found = named(value, file=file, prefix=f"{name}.")
        elif name in _SECTIONS:
            raise ConfigError("is a table, not a value", file=file, field=name, remedy=f"give --{name}.KEY")
        else:
            # A key of another section first: `train.lr` means optim.lr, which spelling alone would not find
            elsewhere = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
            close = elsewhere[0] if elsewhere else nearest(name, known)
            remedy = f"did you mean {close.replace('_', '-')}?" if close else "see smedjan finetune --help"
            raise ConfigError("is no key of a run", file=file, field=f"{prefix}{key}", remedy=remedy)
        if twice := made.keys() & found.keys():
            raise ConfigError("is there twice", file=file, field=min(twice), remedy="keep one")
        made |= found
    return made


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value

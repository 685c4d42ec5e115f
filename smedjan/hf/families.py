"""Proof of every family: a tiny random model of each, made by transformers, imported, compared and taken home again.

transformers saves the model; we import it in each dtype; what we wrote is compared with transformers case by case
(`parity`), and loaded by transformers once more: no parameter missing, none unexpected, the configuration and the
logits those of the first model (the round trip).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from smedjan.errors import ConfigError, nearest
from smedjan.hf.import_model import import_model
from smedjan.hf.parity import Case, parity
from smedjan.hf.peer import Feed, Peer
from smedjan.models.registry import ARCHITECTURES

DTYPES = ("float32", "bfloat16")
MODES = ("logits", "gradients", "decode")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_WINDOW = {"sliding_window": 4}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

TINY: dict[str, dict[str, Any]] = {
    "llama": {
        **SIZES,
        **_BIASES,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {**SIZES, **_WINDOW, "head_dim": 10},
    "ministral": {**SIZES, **_WINDOW, "head_dim": 10, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {**SIZES, **_WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**SIZES, "head_dim": 8, "attention_bias": True, "rope_parameters": {"rope_theta": 1e6, **_YARN}},
    "gemma": {**SIZES, "head_dim": 10},
    "gemma2": {**SIZES, **_WINDOW, "head_dim": 10, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**SIZES, **_WINDOW, "head_dim": 10, "query_pre_attn_scalar": 20, "num_hidden_layers": 7},
    "phi3": {
        **SIZES,
        "original_max_position_embeddings": 10,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    },
    "granite": {
        **SIZES,
        **_BIASES,
        "embedding_multiplier": 12.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
    },
    "smollm3": {**SIZES, **_WINDOW, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0]},
    "olmo2": {**SIZES, "attention_bias": True},
    "olmo3": {**SIZES, **_WINDOW},
    "starcoder2": {**SIZES, **_WINDOW},
    "cohere2": {**SIZES, **_WINDOW, "logit_scale": 0.3},
    "stablelm": {**SIZES, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    "gpt_neox": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    "gpt2": {
        **{key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        "n_embd": 48,
        "n_layer": 4,
        "n_head": 6,
        "n_positions": 64,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "arcee": {**SIZES, **_BIASES},
    "seed_oss": {**SIZES, "head_dim": 10, "attention_out_bias": True},
    "cohere": {**SIZES, "attention_bias": True},
    "ernie4_5": {**SIZES, "head_dim": 10, "use_bias": True},
    "exaone4": {**SIZES, **_WINDOW},
    "glm": {**SIZES, "head_dim": 12},
    "glm4": {**SIZES, "head_dim": 12},
    "helium": {**SIZES, **_BIASES, "head_dim": 8},
    "vaultgemma": {**SIZES, **_WINDOW, "head_dim": 10, "query_pre_attn_scalar": 20},
}
"""Arguments of transformers' configuration classes: a model of every family, with what sets the family apart."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One family in one dtype. `logits`, `gradients`, `decode`: (cases that hold, cases), one for each attention and
    padding. `problems`: what does not hold, and where; what the round trip lost."""

    family: str
    dtype: str
    attention: tuple[str, ...]
    logits: tuple[int, int]
    gradients: tuple[int, int]
    decode: tuple[int, int]
    round_trip: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def cells(self) -> tuple[str, str, str, str]:
        logits, gradients, decode = (f"{good}/{of}" for good, of in (self.logits, self.gradients, self.decode))
        return logits, gradients, decode, "equal" if self.round_trip else "DIFFERS"


@dataclass(frozen=True, kw_only=True)
class FamiliesReport:
    """`skipped` has what transformers itself refuses, with its reason."""

    rows: tuple[Row, ...]
    skipped: tuple[dict[str, str], ...]
    backend: str
    exact: bool
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)


def prove(
    families: Sequence[str] = (),
    *,
    backend: str = "torch_reference",
    on_row: Callable[[Row], None] | None = None,
) -> FamiliesReport:
    """Compares each of `families` (all, where none is named), in float32 and bfloat16."""
    names = tuple(families) or tuple(ARCHITECTURES)
    for name in names:
        if name not in ARCHITECTURES:
            close = nearest(name, set(ARCHITECTURES))
            hint = f"did you mean {close}? " if close else ""
            raise ConfigError(f"{name!r} is no family", field="family", remedy=f"{hint}see smedjan families --help")
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    versions: dict[str, str] = {}
    exact = True
    for name in names:
        with TemporaryDirectory() as folder, _silent():
            source = Path(folder) / "source"
            _make(name, source)
            for dtype in DTYPES:
                taken = Path(folder) / dtype
                import_model(source, taken, dtype=dtype)
                report = parity(taken, dtypes=(dtype,), backend=backend)
                lost = tuple(_lost(source, taken, dtype))
                rows.append(_row(name, dtype, report.cases, lost))
                skipped += [{**skip, "name": f"{name} {skip['name']}"} for skip in report.skipped]
                versions, exact = report.versions, report.exact
        if on_row is not None:
            for row in rows[-len(DTYPES) :]:
                on_row(row)
    return FamiliesReport(rows=tuple(rows), skipped=tuple(skipped), backend=backend, exact=exact, versions=versions)


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bars and its remarks on token ids that tiny models do not have."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _make(family: str, directory: Path) -> None:
    """Every weight random: fresh biases are 0 and fresh norms 1, and would hide what forgets them."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY[family]))
    for parameter in model.parameters():
        mean, std = (0.0, 0.2) if parameter.ndim > 1 else (0.5, 0.3)
        parameter.detach().normal_(mean, std)
    model.save_pretrained(directory)


def _lost(source: Path, taken: Path, dtype: str) -> Iterator[str]:
    """What transformers finds otherwise in the directory that we wrote than in its own."""
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "local_files_only": True}
    before = AutoModelForCausalLM.from_pretrained(source, **settings)
    loaded: Any = AutoModelForCausalLM.from_pretrained(taken, output_loading_info=True, **settings)
    after, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[what]:
            yield f"round trip: {what} {sorted(map(str, info[what]))}"
    ids = np.arange(24, dtype=np.int64).reshape(2, 12) % after.config.vocab_size
    feed = Feed("", ids, None, fresh=True)
    ours, theirs = Peer(after).feed(feed), Peer(before).feed(feed)
    if ours.shape != theirs.shape or ours.tobytes() != theirs.tobytes():
        yield f"round trip: logits differ by up to {np.abs(ours - theirs).max():.3g}"
    for key, old, new in changed(before.config.to_dict(), after.config.to_dict()):
        yield f"round trip: {key} was {old!r} and is {new!r}"


def changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of what two configurations of transformers have otherwise. We write out what was left
    to a default (head_dim, a rope table's truncate), so a key that was null or absent may have a value now."""
    for key, value in old.items():
        if key in ("dtype", "_name_or_path"):
            continue
        if isinstance(value, dict) and isinstance(new.get(key), dict):
            yield from changed(value, new[key], f"{prefix}{key}.")
        elif value is not None and new.get(key) != value:
            yield f"{prefix}{key}", value, new.get(key)


def _row(family: str, dtype: str, cases: Iterable[Case], lost: tuple[str, ...]) -> Row:
    counts = {mode: [0, 0] for mode in MODES}
    problems, attentions = list(lost), []
    for case in cases:
        counts[case.mode][0] += case.holds
        counts[case.mode][1] += 1
        attentions.append(case.attention)
        if not case.holds:
            problems.append(f"{case.name}: {case.parted or case.tensor}")
    if not attentions:
        problems.append("nothing was compared")
    return Row(
        family=family,
        dtype=dtype,
        attention=tuple(dict.fromkeys(attentions)),
        round_trip=not lost,
        problems=tuple(problems),
        logits=(counts["logits"][0], counts["logits"][1]),
        gradients=(counts["gradients"][0], counts["gradients"][1]),
        decode=(counts["decode"][0], counts["decode"][1]),
    )

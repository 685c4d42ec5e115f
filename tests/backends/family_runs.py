"""Twenty training steps of a little model of each family, on any backend: full, LoRA and QLoRA, whole rows and packed.

The truth is the same run in float64, of the very weights that are stored: those of 4 bits are widened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference import TorchReference
from smedjan.checkpoint import stored
from smedjan.data.collate import IGNORE, Batch
from smedjan.graph.lowering import RuleTable
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora, is_named
from smedjan.runtime.session import Session
from smedjan.train.step import Trainer
from tests.backends.cpu_native.fused_cases import WIDE, Float64
from tests.conftest import VOCAB
from tests.families import CASES, make_model, make_session_of
from tests.tolerances import nudged

METHODS, KINDS = ("full", "lora", "qlora"), ("causal", "packed")
"""And "mixed", all of them in one run: a block's linear layers are, by turns, of 4 bits with an adapter, frozen with an
adapter, and trained whole, as all else is."""
STEPS, SEQ = 20, 12
RATES = {"full": 1e-3, "lora": 5e-3, "qlora": 5e-3, "mixed": 2e-3}
EPS = 1e-3
"""AdamW's first step of a gradient below eps of 1e-8 is its sign, which rounding decides where the gradient is near
zero; a tenth of a usual gradient makes the step a smooth function of it."""

TABLE = RuleTable("float64 of quantized weights", parent=WIDE)


@TABLE.rule("nf4_dequantize")
def _widened(*parts: torch.Tensor, **attrs: Any) -> torch.Tensor:
    (rule,) = ATEN._rules["nf4_dequantize"]
    return rule.run(*parts, **attrs).double()


class Truth(Float64):
    """With a state of float64 beside the weights, and weights of 4 bits as they are stored."""

    rules = TABLE

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def settings_of(family: str) -> dict[str, Any]:
    """The family's first case in two layers, one of them with what only some layers have: the window, no rotation."""
    settings = dict(next(iter(CASES[family].values())))
    settings["n_layer" if family == "gpt2" else "num_hidden_layers"] = 2
    if family == "smollm3":
        settings["no_rope_layers"] = [1, 0]
    elif family == "exaone4" or "layer_types" in settings or (settings.get("sliding_window") and family != "mistral"):
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    return settings


def batch_of(kind: str, seed: int) -> Batch:
    """Two rows; packed, of two and three documents, with a longer one than the windows are."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(4, VOCAB, (2, SEQ))
    labels = np.full_like(ids, IGNORE)
    labels[:, 1:-1] = ids[:, 2:]
    positions, documents = np.broadcast_to(np.arange(SEQ), ids.shape), None
    if kind == "packed":
        starts = np.zeros_like(ids)
        starts[0, 7] = starts[1, 2] = starts[1, 9] = 1
        documents = np.cumsum(starts, axis=1)
        first = np.maximum.accumulate(np.where(starts == 1, np.arange(SEQ), 0), axis=1)
        positions = np.arange(SEQ) - first
        labels[:, :-1][starts[:, 1:] == 1] = IGNORE
    rows = np.flatnonzero(labels != IGNORE)
    return Batch(
        input_ids=ids,
        position_ids=positions,
        labels=labels,
        attention_mask=None,
        segment_ids=documents,
        loss_rows=rows,
        trained_tokens=len(rows),
        tokens=ids.size,
        kind=kind,
    )


@cache
def _weights(family: str) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """Gemma's norms scale by 1 + w: near 1 in all families, which no rounding is amplified much by."""
    session = make_session_of(make_model(family, settings_of(family), attention="eager", calm=True), attention="eager")
    for name, array in session.parameters.items():
        if session.config.norm.offset and "norm" in name:
            array.sub_(session.config.norm.offset)
    return session.config, session.parameters


@dataclass(frozen=True)
class Parts:
    """Arrays of torch_reference by name, adapters among them; the names of what is trained; the weights of 4 bits."""

    arrays: dict[str, torch.Tensor]
    trained: list[str]
    lora: Lora | None
    narrow: tuple[str, ...]


def parts_of(family: str, method: str) -> Parts:
    """Adapters lie beside every linear layer of the blocks; their B is no longer zero."""
    config, weights = _weights(family)
    arrays = {name: array.clone() for name, array in weights.items()}
    if method == "full":
        return Parts(arrays, list(arrays), None, ())
    targets, narrow = config.linear_layers(), {"lora": (), "qlora": config.linear_weights()}.get(method)
    if method == "mixed":
        narrow = tuple(name for name in config.linear_weights() if is_any(name, targets[::3]))
        targets = (*targets[::3], *targets[1::3])
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=targets, transposed=config.conv1d)
    generator = torch.Generator().manual_seed(4)
    adapters = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in lora.shapes(config.parameter_shapes()).items()
    }
    frozen = {name for name in arrays if method != "mixed" or lora.matches(name.removesuffix(".weight"))}
    reference = TorchReference()
    trained = [*(name for name in arrays if name not in frozen), *adapters]
    for name in narrow:
        made = stored.quantize("nf4", reference.to_raw(arrays.pop(name)))
        arrays |= {f"{name}.{suffix}": reference.from_raw(part) for suffix, part in made.items()}
    return Parts(arrays | adapters, trained, lora, narrow)


def is_any(name: str, targets: Sequence[str]) -> bool:
    return any(is_named(name.removesuffix(".weight"), target) for target in targets)


@dataclass(frozen=True)
class Curve:
    """Both in float64: losses [steps], gradients [steps, parameters] before they are clipped."""

    losses: torch.Tensor
    gradients: torch.Tensor


class _Recorder(Trainer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradients: list[torch.Tensor] = []

    def losses_and_grads(self, batches: Sequence[Batch], *, number: int) -> Any:
        losses, grads = super().losses_and_grads(batches, number=number)
        arrays = (grads[name] for name in self.names)
        if not isinstance(self.session.backend, TorchReference):
            to_raw, from_raw = self.session.backend.to_raw, TorchReference().from_raw
            arrays = (from_raw(to_raw(array)) for array in arrays)
        self.gradients.append(torch.cat([array.reshape(-1).double() for array in arrays]))
        return losses, grads


class Runs:
    """Runs on one backend; they share their programs."""

    def __init__(self, family: str, method: str, kind: str, on: Any) -> None:
        self.on, self.kind, self.rate, self.parts = on, kind, RATES[method], parts_of(family, method)
        config, held = _weights(family)[0], self.parts
        self.stored = {name for name in held.arrays if name.startswith(tuple(f"{each}." for each in held.narrow))}
        options = {"attention": "eager", "lora": held.lora, "quantized": held.narrow}
        self.session = Session(on, config, self._placed(held.arrays), "float32", **options)

    def _placed(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if isinstance(self.on, Float64):
            return {name: array.clone() if name in self.stored else array.double() for name, array in arrays.items()}
        to_raw = TorchReference().to_raw
        return {name: self.on.from_raw(to_raw(array)) for name, array in arrays.items()}

    def curve(self, *, nudge: int = 0) -> Curve:
        """With `nudge`, of weights that are `nudged`."""
        arrays = {
            name: nudged(array, nudge + number) if nudge and name not in self.stored else array
            for number, (name, array) in enumerate(self.parts.arrays.items())
        }
        self.session.parameters.update(self._placed(arrays))
        trainer = _Recorder(self.session, self.parts.trained, AdamW(clip=1.0, weight_decay=0.01, eps=EPS))
        batches = [batch_of(self.kind, seed) for seed in range(3)]
        losses = [trainer.step([batches[number % 3]], number=number, lr=self.rate)[0] for number in range(1, STEPS + 1)]
        return Curve(torch.tensor(losses, dtype=torch.float64), torch.stack(trainer.gradients))

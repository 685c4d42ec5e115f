"""transformers itself, as the other side of a comparison: the one module that runs it (and torch.autograd with it)."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from smedjan.data.collate import IGNORE, Batch
from smedjan.errors import BackendError
from smedjan.hf.load import ModelFiles

DECODE = 3
"""Tokens decoded after a prefill."""

Named = dict[str, np.ndarray]
"""Float arrays by name: HF's parameter name, or what a step of decoding is called."""


class Refused(Exception):
    """transformers does not run this model with this attention; the text is its own reason."""


@dataclass(frozen=True, eq=False)
class Feed:
    """One call with a cache. `mask` [B, old + new tokens] or None; the first feed of a text starts a fresh cache."""

    name: str
    ids: np.ndarray
    mask: np.ndarray | None
    fresh: bool


def feeds(batch: Batch, prefills: tuple[int, ...]) -> Iterator[Feed]:
    """For each length, a prefill of so many of the batch's tokens and DECODE steps of one token a row.

    The tokens fed after a prefill are fixed ones, so that a near-tie cannot send the two sides apart.
    """
    rows = len(batch.input_ids)
    for length in prefills:
        label = "" if length == batch.input_ids.shape[1] else f" after {length} tokens"
        mask = None if batch.attention_mask is None else batch.attention_mask[:, :length]
        yield Feed(f"prefill{label}", batch.input_ids[:, :length], mask, fresh=True)
        for step in range(DECODE):
            if mask is not None:
                mask = np.concatenate([mask, np.ones((rows, 1), dtype=np.int64)], axis=1)
            yield Feed(f"step {step}{label}", batch.input_ids[:, step : step + 1], mask, fresh=False)


class Peer:
    """A live `transformers` model in its own dtype; with `wide`, a float64 one that nothing in it narrows."""

    def __init__(self, model: Any, *, wide: bool = False) -> None:
        self.model, self.wide = model.eval(), wide
        self._past: Any = None

    @classmethod
    def open(cls, files: ModelFiles, dtype: str) -> Peer:
        """The model in a directory, with the attention that every model has: `use` chooses another."""
        import torch
        from transformers import AutoModelForCausalLM

        if not (files.path / "config.json").is_file():
            raise BackendError(
                "transformers needs a model directory", file=files.path, remedy="smedjan import it first"
            )
        if files.affine:
            raise BackendError(
                "transformers reads none of MLX's few bits", file=files.path, remedy="smedjan import it first"
            )
        model = AutoModelForCausalLM.from_pretrained(
            files.path, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
        )
        return cls(model)

    @property
    def attention(self) -> str:
        return self.model.config._attn_implementation

    def use(self, attention: str) -> None:
        """Chooses transformers' attention, and tries it on two tokens: some models refuse only when they run."""
        try:
            self.model.set_attn_implementation(attention)
            if self.attention == attention:
                self.feed(Feed("", np.zeros((1, 2), dtype=np.int64), None, fresh=True))
        except (ValueError, ImportError) as cause:
            raise Refused(" ".join(str(cause).split())) from cause
        if self.attention != attention:
            raise Refused(f"{type(self.model).__name__} computes {self.attention} where {attention} is asked for")

    def widened(self) -> Peer:
        """The same weights, computed with in float64."""
        return Peer(deepcopy(self.model).double(), wide=True)

    def run(self, batch: Batch, prefills: tuple[int, ...]) -> dict[str, Named]:
        """Logits, loss and gradients, and the logits of every feed; by mode, then by name."""
        logits, gradients = self.backward(batch)
        return {
            "logits": logits,
            "gradients": gradients,
            "decode": {feed.name: self.feed(feed) for feed in feeds(batch, prefills)},
        }

    def backward(self, batch: Batch, *, gradients: bool = True) -> tuple[Named, Named]:
        """({"logits"}, {"loss" and, with `gradients`, every parameter}). What the loss does not depend on has zeros."""
        import torch

        shifted = torch.from_numpy(batch.labels)
        labels = torch.full_like(shifted, IGNORE)
        labels[:, 1:] = shifted[:, :-1]
        self._settle()
        self.model.zero_grad(set_to_none=True)
        with self._precision():
            out = self.model(
                input_ids=torch.from_numpy(batch.input_ids.copy()),
                attention_mask=None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask),
                labels=labels,
            )
            if gradients:
                out.loss.backward()
        grads = {
            name: np.zeros(tuple(parameter.shape), dtype=self._numpy)
            if parameter.grad is None
            else self._host(parameter.grad)
            for name, parameter in self.model.named_parameters()
            if gradients
        }
        self.model.zero_grad(set_to_none=True)
        return {"logits": self._host(out.logits)}, {"loss": self._host(out.loss), **grads}

    def feed(self, feed: Feed) -> np.ndarray:
        """Logits [B, T, V] of the new tokens. Feeds follow one another: the cache is the peer's own."""
        import torch

        if feed.fresh:
            self._past = None
            self._settle()
        with torch.no_grad(), self._precision():
            out = self.model(
                input_ids=torch.from_numpy(feed.ids.copy()),
                attention_mask=None if feed.mask is None else torch.from_numpy(feed.mask.copy()),
                past_key_values=self._past,
                use_cache=True,
            )
        self._past = out.past_key_values
        return self._host(out.logits)

    def _settle(self) -> None:
        """A dynamic rotary table keeps the size of the longest text that it has seen, until it sees a short one."""
        import torch

        if any("dynamic" in str(vars(module).get("rope_type", "")) for module in self.model.modules()):
            with torch.no_grad(), self._precision():
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)

    @property
    def _numpy(self) -> type[np.floating]:
        return np.float64 if self.wide else np.float32

    def _host(self, tensor: Any) -> np.ndarray:
        return (tensor.detach().double() if self.wide else tensor.detach().float()).numpy().copy()

    def _precision(self) -> Any:
        from contextlib import nullcontext

        from smedjan.hf.peer_trace import Wide

        return Wide() if self.wide else nullcontext()

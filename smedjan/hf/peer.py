"""transformers itself, as the other side of a comparison: the one module that runs it (and torch.autograd with it)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from smedjan.data.collate import IGNORE, Batch
from smedjan.errors import BackendError
from smedjan.hf.load import ModelFiles

DECODE = 3
"""Tokens decoded after the prefill."""

Named = dict[str, np.ndarray]


def continuation(batch: Batch) -> list[np.ndarray]:
    """The tokens fed after the prefill: fixed ones, so that a near-tie cannot send the two sides apart."""
    return [batch.input_ids[:, step : step + 1] for step in range(DECODE)]


class Peer:
    """transformers' own model of the same weights in `dtype`; with `wide`, those weights computed with in float64."""

    def __init__(self, files: ModelFiles, dtype: str, attention: str, *, wide: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if not (files.path / "config.json").is_file():
            raise BackendError(
                "transformers needs a model directory", file=files.path, remedy="smedjan import it first"
            )
        model = AutoModelForCausalLM.from_pretrained(
            files.path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
        )
        self.wide = wide
        self.model = model
        if wide:
            self.model = model.double()
            widen_norms(self.model)

    def run(self, batch: Batch) -> dict[str, Named]:
        import torch

        def host(tensor: Any) -> np.ndarray:
            return tensor.detach().to(torch.float64 if self.wide else torch.float32).numpy().copy()

        ids = torch.from_numpy(batch.input_ids.copy())
        mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
        shifted = torch.from_numpy(batch.labels)
        labels = torch.full_like(shifted, IGNORE)
        labels[:, 1:] = shifted[:, :-1]
        out = self.model(input_ids=ids, attention_mask=mask, labels=labels)
        loss = out.loss
        if self.wide:  # transformers' own loss is computed in float32
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORE)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        grads = {name: host(parameter.grad) for name, parameter in self.model.named_parameters()}
        with torch.no_grad():
            step = self.model(input_ids=ids, attention_mask=mask, use_cache=True)
            decoded = {"prefill": host(step.logits)}
            for number, tokens in enumerate(continuation(batch)):
                mask = None if mask is None else torch.cat([mask, torch.ones(len(tokens), 1, dtype=mask.dtype)], dim=1)
                step = self.model(
                    input_ids=torch.from_numpy(tokens.copy()),
                    attention_mask=mask,
                    past_key_values=step.past_key_values,
                    use_cache=True,
                )
                decoded[f"step {number}"] = host(step.logits)
        logits = host(out.logits)
        return {
            "logits": {"logits": logits},
            "gradients": {"loss": host(loss), **grads},
            "decode": decoded,
        }


def widen_norms(model: Any) -> None:
    """transformers computes RMS norms in float32 whatever their input is; a float64 reference must not."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def wide(norm: Any, x: Any) -> Any:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            setattr(module, "forward", partial(wide, module))  # noqa: B010  (a method, for mypy)

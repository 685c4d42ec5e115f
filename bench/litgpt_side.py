"""litgpt's step in bench/train.py: its LoRA model and its chunked loss, as its `finetune lora` and `finetune full` run
them, without Lightning's loop around.

litgpt wants older packages than transformers 5 does, so that it lies in a folder of its own:

    pip install --no-deps --target SITE litgpt lightning lightning-utilities torchmetrics jsonargparse pytorch-lightning
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

RANK, CHUNK = 16, 128
"""The adapters' rank, and rows of logits at a time of litgpt's own loss."""


def import_from(site: str) -> None:
    sys.path.append(site)
    import litgpt.lora
    import litgpt.scripts.convert_hf_checkpoint  # noqa: F401


class LitGPT:
    """One model. litgpt has a head of its own where the checkpoint's is tied, and trains it in full fine-tuning."""

    def __init__(self, directory: str, method: str, dtype: str) -> None:
        import torch
        from litgpt import lora, model
        from litgpt.config import Config
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from litgpt.utils import chunked_cross_entropy
        from safetensors.torch import load_file

        name, kind = "SmolLM2-135M", getattr(torch, dtype)
        if method == "lora":
            everywhere = dict.fromkeys((f"lora_{part}" for part in PARTS), True)
            config: Any = lora.Config.from_name(name, lora_r=RANK, lora_alpha=2 * RANK, **everywhere)
            self.model = lora.GPT(config)
        else:
            config = Config.from_name(name)
            self.model = model.GPT(config)
        state: dict[str, Any] = {}
        copy_weights_hf_llama(config, {}, state, load_file(Path(directory) / "model.safetensors"))
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])
        missing, unknown = self.model.load_state_dict(state, strict=False)
        assert not unknown, unknown
        assert all("lora_" in each for each in missing), missing
        self.model.to(kind)
        if method == "lora":
            lora.mark_only_lora_as_trainable(self.model)
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)
        self.loss = chunked_cross_entropy

    def step(self, batch: Any, number: int) -> float:
        import torch

        ids = torch.tensor(batch.input_ids).long()
        targets = torch.tensor(batch.labels).long()[:, :-1]  # a Batch's labels are shifted
        logits = self.model(ids, lm_head_chunk_size=CHUNK)
        logits[-1] = logits[-1][..., :-1, :]
        loss = self.loss(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def plan_hash(self) -> None:
        return None


PARTS = ("query", "key", "value", "projection", "mlp")

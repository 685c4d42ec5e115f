"""One tiny Llama with its tokenizer, rows to train it on, and transformers trained on the very same batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smedjan.data.collate import IGNORE, Batch
from smedjan.hf.peer_trace import Wide
from smedjan.train.config import FinetuneConfig

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V about 280, H 48, 2 layers, 6 heads on 2 groups, tied; weights of std 0.1, so that attention is not uniform."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world this is a tiny text"] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_uneven_rows(folder: Path) -> None:
    """rows.jsonl, of as many lengths as make micro-batches differ, and seven of them as valid.jsonl."""
    rows = [{"prompt": "hello " * (i % 4 + 1) + f"{i} ", "completion": f"world {i % 3}"} for i in range(40)]
    for name, some in (("rows", rows), ("valid", rows[3:10])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A JSONL file of the rows given."""

    def write(rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def pairs(write_rows: Callable[..., Path]) -> Path:
    """40 rows of different lengths whose completion follows from the prompt."""
    return write_rows([{"prompt": "hello " * (i % 4 + 1) + f"{i} ", "completion": f"world {i % 3}"} for i in range(40)])


@pytest.fixture
def configure(tiny: Path, pairs: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """A config by dotted keys, as flags would give it."""

    def make(out: str = "run", **flags: Any) -> FinetuneConfig:
        named: dict[str, Any] = {
            "model": str(tiny),
            "data": str(pairs),
            "method": "full",
            "backend": "torch_reference",
            "out": str(tmp_path / out),
            "train.batch_size": 4,
            "optim.lr": 1e-2,
        }
        named.update({key.replace("__", "."): value for key, value in flags.items()})
        return FinetuneConfig.from_toml(None, named)

    return make


class PeerTrainer:
    """transformers' model of a directory, trained by torch.optim.AdamW on smedjan's batches."""

    def __init__(self, directory: Path, dtype: torch.dtype, *, lr: float, clip: float) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        self.model = model.to(dtype)
        self.wide = dtype == torch.float64
        self.clip = clip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, foreach=False)

    def backward(self, batches: Sequence[Batch]) -> float:
        """The step's loss, and its gradients in the parameters. A packed row is told by its positions, as there."""
        self.optimizer.zero_grad(set_to_none=True)
        items, total = torch.tensor(sum(batch.trained_tokens for batch in batches)), 0.0
        for batch in batches:
            packed, mask = batch.kind == "packed", batch.attention_mask
            shifted = torch.from_numpy(batch.labels)
            labels = torch.full_like(shifted, IGNORE)
            labels[:, 1:] = shifted[:, :-1]
            with Wide() if self.wide else nullcontext():
                out = self.model(
                    input_ids=torch.from_numpy(batch.input_ids),
                    attention_mask=None if mask is None or packed else torch.from_numpy(mask),
                    position_ids=torch.from_numpy(batch.position_ids) if packed else None,
                    labels=labels,
                    num_items_in_batch=items,
                    use_cache=False,
                )
                out.loss.backward()
            total += float(out.loss.detach())
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}

    def step(self, batches: Sequence[Batch]) -> float:
        loss = self.backward(batches)
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss


@pytest.fixture(scope="session")
def peer_trainer() -> type[PeerTrainer]:
    return PeerTrainer


@pytest.fixture
def read_log() -> Callable[[Path], SimpleNamespace]:
    """log.jsonl of a run directory: `steps` and `evals`, in order."""

    def read(out: Path) -> SimpleNamespace:
        events = [json.loads(line) for line in (out / "smedjan" / "log.jsonl").read_text().splitlines()]
        return SimpleNamespace(
            steps=[event for event in events if "loss" in event],
            evals=[event for event in events if "eval_loss" in event],
        )

    return read

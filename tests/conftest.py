"""A tiny Llama in transformers and in smedjan, with the same weights: what every test of bit equality compares."""

from __future__ import annotations

import os

if not os.path.exists("/dev/nvidiactl"):
    # Before anything imports triton: its own library functions choose the interpreter when they are defined.
    os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig as PeerConfig
from transformers import LlamaForCausalLM

from smedjan.models.registry import read_config
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session

PAD, VOCAB = 3, 97


@pytest.fixture(autouse=True, scope="session")
def _token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not the cache of whoever runs the tests; commands that they start have it too."""
    os.environ["SMEDJAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def make_peer(*, dtype: str = "float32", attention: str = "sdpa", **changes: Any) -> LlamaForCausalLM:
    """V 97, H 48, 2 layers, 6 heads of 8; every weight random. inv_freq stays float32, as from_pretrained keeps it."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        **changes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(PeerConfig(**settings), attn_implementation=attention, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    if dtype == "bfloat16":
        inv_freq = model.model.rotary_emb.inv_freq.clone()
        model = model.to(torch.bfloat16)
        model.model.rotary_emb.inv_freq = inv_freq
    return model


def make_session(peer: LlamaForCausalLM, *, attention: str = "sdpa", lora: Any = None, **changes: Any) -> Session:
    """The exact session over copies of the peer's weights; `changes` edit its config.json, for mutations."""
    data = {**peer.config.to_dict(), "architectures": ["LlamaForCausalLM"], **changes}
    parameters = {name: parameter.detach().clone() for name, parameter in peer.named_parameters()}
    dtype = str(peer.dtype).removeprefix("torch.")
    config = read_config(data, Path("config.json"))
    return Session(backend("torch_reference"), config, parameters, dtype, attention=attention, lora=lora)


def make_batch(padding: str = "none", *, batch: int = 2, seq: int = 7, seed: int = 1) -> SimpleNamespace:
    """A Batch by its fields, with the peer's arguments in `peer`. The first two labels of each row are not trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (batch, seq), generator=generator)
    mask = None
    if padding != "none":
        mask = torch.ones(batch, seq, dtype=torch.long)
        mask[0, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
        ids[mask == 0] = PAD
    labels = ids.clone()
    labels[:, :2] = -100
    if mask is not None:
        labels[mask == 0] = -100
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    return SimpleNamespace(
        input_ids=ids.numpy(),
        position_ids=np.broadcast_to(np.arange(seq), (batch, seq)),
        labels=shifted.numpy(),
        attention_mask=None if mask is None else mask.numpy(),
        kind="causal" if mask is None else "padded",
        trained_tokens=int((shifted != -100).sum()),
        peer={"input_ids": ids, "attention_mask": mask, "labels": labels},
    )


def assert_bits(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Same dtype, shape and bits."""
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} is not {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{name}: {list(ours.shape)} is not {list(theirs.shape)}"
    off = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
    assert torch.equal(ours, theirs), f"{name}: differs by up to {off:.3e}"

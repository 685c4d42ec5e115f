"""A two-layer Llama on MLX against torch_reference: logits, every gradient, cached decoding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_pair import MLX, TORCH, bound, from_torch, to_torch

from smedjan.backends.mlx_metal import MlxProgram, attention, loss
from smedjan.models.registry import read_config
from smedjan.runtime.session import Cache, Session, bucket_rows

DEPTH = 2 * 80 * 20
"""Terms that a value of this model sums over its longest path: layers, widths and rows, for the float32 bound."""


def config(*, tied: bool, bias: bool):
    return read_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
            "attention_bias": bias,
            "mlp_bias": bias,
        },
        Path("config.json"),
    )


def sessions(dtype: str, *, tied: bool = True, bias: bool = False) -> list[Session]:
    """The same (rounded) parameters: torch in float32, torch in `dtype`, MLX in `dtype`."""
    made, generator = config(tied=tied, bias=bias), torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in made.parameter_shapes().items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if name.endswith("norm.weight") else 0.2 * noise).to(getattr(torch, dtype))
    return [
        Session(backend, made, {n: from_torch(backend, w.to(getattr(torch, kind))) for n, w in weights.items()}, kind)
        for backend, kind in ((TORCH, "float32"), (TORCH, dtype), (MLX, dtype))
    ]


def batch(kind: str, rows: int = 2, seq: int = 9) -> SimpleNamespace:
    rng = np.random.default_rng(5)
    ids = rng.integers(4, 97, (rows, seq))
    labels = np.full_like(ids, -100)
    labels[:, 2:-1] = ids[:, 3:]
    made = SimpleNamespace(
        input_ids=ids,
        position_ids=np.broadcast_to(np.arange(seq), (rows, seq)),
        labels=labels,
        attention_mask=None,
        segment_ids=None,
        kind=kind,
    )
    if kind == "padded":
        made.attention_mask = np.ones((rows, seq), dtype=bool)
        made.attention_mask[0, :3] = False
        labels[0, :3] = -100
    if kind == "packed":
        made.segment_ids = np.where(np.arange(seq) < 4, 0, 1)[None].repeat(rows, 0)
        made.position_ids = np.where(np.arange(seq) < 4, np.arange(seq), np.arange(seq) - 4)[None].repeat(rows, 0)
        labels[:, 3] = -100
    return made


def compare(dtype: str, name: str, arrays) -> None:
    reference, plain, found = arrays
    assert torch.isfinite(found).all(), name
    error = float((found - reference).abs().max())
    assert error <= bound(reference, plain, dtype, DEPTH), f"{name}: {error}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "tied", "bias"), [("causal", True, False), ("padded", False, True), ("packed", False, False)]
)
def test_logits_loss_and_every_gradient(dtype, kind, tied, bias):
    three, given = sessions(dtype, tied=tied, bias=bias), batch(kind)
    compare(dtype, "logits", [to_torch(s.backend, s.logits(given)).double() for s in three])
    items, wrt = float((given.labels != -100).sum()), list(three[0].parameters)
    results = [(s, *s.micro(given, wrt, num_items=items)) for s in three]
    compare(dtype, "loss", [to_torch(s.backend, value).double() for s, value, _ in results])
    for name in wrt:
        compare(dtype, name, [to_torch(s.backend, grads[name]).double() for s, _, grads in results])


def test_gradients_add_up_in_totals():
    session, given = sessions("float32")[2], batch("causal")
    wrt = list(session.parameters)
    _, once = session.micro(given, wrt, num_items=7.0)
    kept = {name: to_torch(MLX, array).clone() for name, array in once.items()}
    _, twice = session.micro(given, wrt, num_items=7.0, totals=once)
    for name in wrt:
        assert torch.equal(to_torch(MLX, twice[name]), 2 * kept[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["causal", "padded"])
def test_cached_decoding(dtype, kind):
    three, given = sessions(dtype), batch(kind)
    caches, mask, ids = [Cache(s, batch=2, capacity=16) for s in three], given.attention_mask, given.input_ids
    for _ in range(4):
        logits = [to_torch(s.backend, c.feed(ids, mask)).double() for s, c in zip(three, caches, strict=True)]
        compare(dtype, "logits", logits)
        if dtype == "float32":
            assert torch.equal(logits[0][:, -1].argmax(-1), logits[2][:, -1].argmax(-1))
        ids = logits[0][:, -1:].argmax(-1).numpy()
        if mask is not None:
            mask = np.concatenate([mask, np.ones((2, 1), dtype=bool)], axis=1)


def test_the_training_step_traces_under_compile(monkeypatch):
    """Every rule of a step must be traceable, tiles and chunks included. Not evaluated: the CPU build's JIT is slow."""
    monkeypatch.setattr(attention, "TILE_SCORES", 2 * 6 * 9 * 4)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * 97)
    session, given = sessions("bfloat16")[2], batch("padded")
    wrt, labels = list(session.parameters), given.labels.reshape(-1)
    rows = bucket_rows(labels)
    inputs = {**session.parameters, **session.batch_inputs(given), "loss_rows": session.host(rows, "int64")}
    inputs |= {"labels": session.host(labels[rows], "int64"), "num_items": session.host(np.float32(9), "float32")}
    plain = session.micro_program(session.form(given, rows=len(rows)), wrt)
    compiled = MlxProgram(plain.graph, MLX.rules, fuse=True)
    assert compiled.fused
    monkeypatch.setattr(mx, "eval", lambda *_: None)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    made = compiled(inputs)
    shapes = {name: tuple(array.shape) for name, array in made.items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.graph.outputs.items()}

"""Issue 7, Shows: "cached decode past the window; greedy text equal in f32", of every family on MLX's CPU build.

A text of five windows goes through the cache in parts of several sizes: into the empty cache, across the window's edge,
a block longer than the window, single tokens. Held is the norm of all its logits, by `assert_near` of
tests/tolerances.py. The truth is transformers' model in float64, which sees the text at once and knows no cache;
torch_reference, fed the same parts, is the plain computation. `tests/backends/test_families.py` has the same of one
prefill and three tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from smedjan.checkpoint.dtype import to_float32
from smedjan.generate import generate
from smedjan.hf.parity import _rows
from smedjan.hf.peer import Peer
from smedjan.runtime.session import Cache, Session
from tests.families import CASES, make_model, make_session_of
from tests.tolerances import assert_near

WINDOW, PADDINGS = 4, ("none", "left")
PARTS = (3, 2, 1, 6, 1, 1, 4, 1, 1)
PROMPT = [5, 80, 13, 7, 44, 21, 9]
NEW = 24
SEEDS = {("gemma2", "tight-caps"): 1, ("gemma3_text", "cap-biases"): 1}
"""Where the weights of seed 0 say one token again and again."""


def windowed() -> Iterator[Any]:
    """Each case with a window that the text goes past. In every run of the tests the first of each family, padded or
    not by turns."""
    seen: list[str] = []
    for family, cases in CASES.items():
        for case, settings in cases.items():
            if settings.get("sliding_window") == WINDOW:
                turn = None if family in seen else PADDINGS[len(seen) % 2]
                for padding in PADDINGS:
                    marks = () if padding == turn else pytest.mark.slow
                    yield pytest.param(family, case, padding, marks=marks)
                if turn:
                    seen.append(family)


def in_parts(session: Session, batch: Any) -> torch.Tensor:
    """[B, T, V]"""
    rows, seq = batch.input_ids.shape
    cache, made = Cache(session, batch=rows, capacity=seq), []
    for size in PARTS:
        end = cache.length + size
        mask = None if batch.attention_mask is None else batch.attention_mask[:, :end]
        raw = session.backend.to_raw(cache.feed(batch.input_ids[:, cache.length : end], mask))
        made.append(torch.from_numpy(to_float32(raw).reshape(raw.shape).copy()))
    return torch.cat(made, dim=1)


@pytest.mark.parametrize(("family", "case", "padding"), windowed())
def test_decode_in_parts_past_the_window(family: str, case: str, padding: str) -> None:
    model = make_model(family, CASES[family][case], attention="eager")
    plain, ours = (make_session_of(model, attention="eager", on=on) for on in ("torch_reference", "mlx_metal"))
    assert plain.config.window == WINDOW
    batch = _rows(plain.config, padding, 0, sum(PARTS))
    real = np.ones(batch.input_ids.shape, bool) if batch.attention_mask is None else batch.attention_mask > 0
    truth = torch.from_numpy(Peer(model).widened().backward(batch, gradients=False)[0]["logits"])[real]
    assert_near(f"{family}, {case}", in_parts(ours, batch)[real], truth, in_parts(plain, batch)[real])


def one_each() -> Iterator[Any]:
    """The first case of each family in every run of the tests."""
    for family, cases in CASES.items():
        for number, case in enumerate(cases):
            yield pytest.param(family, case, marks=pytest.mark.slow if number else ())


@pytest.mark.parametrize(("family", "case"), one_each())
def test_greedy_text_is_torch_reference_s(family: str, case: str) -> None:
    model = make_model(family, CASES[family][case], attention="eager", calm=True, seed=SEEDS.get((family, case), 0))
    sessions = [make_session_of(model, attention="eager", on=on) for on in ("torch_reference", "mlx_metal")]
    count = min(NEW, sessions[0].config.max_position_embeddings - len(PROMPT))
    theirs, ours = (list(generate(session, PROMPT, max_new_tokens=count)) for session in sessions)
    assert ours == theirs
    assert len(set(ours)) > 2, "a text, and not one token again and again"

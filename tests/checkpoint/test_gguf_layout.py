"""Layouts move elements and lose none: what is packed is unpacked to the bit, in every dtype's bits."""

from __future__ import annotations

import numpy as np
import pytest

from smedjan.checkpoint.gguf_layout import Layout

CASES = {
    "copy": ((6, 4), (6, 4), 0),
    "pairs": ((12, 5), (12, 5), 3),
    "transpose": ((4, 6), (6, 4), 0),
    "heads": ((18, 5), (18, 5), 3),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("bits", [np.uint16, np.uint32])
def test_unpack_is_the_inverse_of_pack(kind: str, bits: type) -> None:
    shape, stored, heads = CASES[kind]
    layout = Layout(name="x", shape=stored, parameters=("p",), kind=kind, heads=heads)
    array = np.arange(np.prod(shape), dtype=bits).reshape(shape)
    packed = layout.pack([array])
    assert (packed.shape, packed.dtype) == (stored, bits)
    assert kind == "copy" or not np.array_equal(packed.ravel(), array.ravel())
    assert np.array_equal(layout.unpack(packed, 0, shape), array)


def test_pairs_are_neighbours_and_heads_are_apart() -> None:
    """One head of 4: (0, 1 | 2, 3) turns 0 with 2; fused heads (q0 k0 v0 q1 k1 v1) become (q0 q1 k0 k1 v0 v1)."""
    pairs = Layout(name="x", shape=(4,), parameters=("p",), kind="pairs", heads=1)
    assert pairs.pack([np.arange(4)]).tolist() == [0, 2, 1, 3]
    heads = Layout(name="x", shape=(6,), parameters=("p",), kind="heads", heads=2)
    assert heads.pack([np.arange(6)]).tolist() == [0, 3, 1, 4, 2, 5]


def test_norms_of_heads_are_stacked() -> None:
    layout = Layout(name="x", shape=(2, 3), parameters=("a", "b"), kind="stack")
    parts = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])]
    packed = layout.pack(parts)
    assert packed.shape == (2, 3)
    assert [layout.unpack(packed, index, (3,)).tolist() for index in (0, 1)] == [part.tolist() for part in parts]


def test_gemma_s_norms_are_exact_for_bfloat16_weights() -> None:
    """w + 1 has room for 24 bits: those of a bfloat16 down to 2^-16 fit; a smaller one is off by half a step of 1."""
    layout = Layout(name="x", shape=(4,), parameters=("p",), kind="offset")
    weights = np.array([0.40625, -(2.0**-16), 3.015625, 1e-9], np.float32)
    back = layout.unpack(layout.pack([weights]), 0, (4,))
    assert back[:3].tolist() == weights[:3].tolist()
    assert abs(back[3] - weights[3]) <= 2.0**-24

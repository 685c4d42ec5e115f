"""Philox4x32-10 gives the known answers of Random123 (kat_vectors), and keep_mask is a function of its key alone."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.torch_reference.random import keep_mask, philox

F = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((F, F, F, F), (F, F), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox((torch.tensor([counter[0]]), *counter[1:]), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_keep_mask_is_a_function_of_its_key():
    key = torch.tensor([1, 2, 3, 4])
    mask = keep_mask(key, shape=(100, 101), p=0.25, site=7)
    assert torch.equal(mask, keep_mask(key, shape=(100, 101), p=0.25, site=7))
    assert torch.equal(mask.reshape(-1)[:999], keep_mask(key, shape=(999,), p=0.25, site=7))
    for place in range(4):
        other = key.clone()
        other[place] += 1
        assert not torch.equal(mask, keep_mask(other, shape=(100, 101), p=0.25, site=7))
    assert not torch.equal(mask, keep_mask(key, shape=(100, 101), p=0.25, site=8))
    deviation = (0.25 * 0.75 / mask.numel()) ** 0.5
    assert abs(float(mask.mean()) - 0.75) < 5 * deviation

"""Philox4x32-10 gives the known answers of Random123 (kat_vectors), and draws are a function of the key alone."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.torch_reference.random import keep_mask, philox, uniform

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


def test_uniform_is_a_function_of_its_key():
    key = torch.tensor([1, 2, 3, 4])
    noise = uniform(key, shape=(100, 101), bound=0.5, site=7)
    assert torch.equal(noise.reshape(-1)[:999], uniform(key, shape=(999,), bound=0.5, site=7))
    assert torch.equal(noise, 0.5 * uniform(key, shape=(100, 101), bound=1.0, site=7))
    for place in range(4):
        other = key.clone()
        other[place] += 1
        assert not torch.equal(noise, uniform(other, shape=(100, 101), bound=0.5, site=7))
    assert not torch.equal(noise, uniform(key, shape=(100, 101), bound=0.5, site=8))


def test_uniform_is_uniform():
    """Mean, variance and every sixteenth of (-1, 1), each within five deviations; symmetric to the last bit."""
    draws = uniform(torch.tensor([1, 2, 3, 4]), shape=(512, 512), bound=1.0, site=0).double().reshape(-1)
    count = draws.numel()
    assert float(draws.abs().max()) < 1.0
    assert float(draws.abs().min()) >= 2.0**-24, "an odd multiple of 2^-24"
    assert abs(float(draws.mean())) < 5 * (1 / 3 / count) ** 0.5
    assert abs(float(draws.square().mean()) - 1 / 3) < 5 * (4 / 45 / count) ** 0.5
    shares = torch.histc(draws, bins=16, min=-1, max=1) / count
    assert float((shares - 1 / 16).abs().max()) < 5 * (15 / 256 / count) ** 0.5
    lag = (draws[:-1] * draws[1:]).mean()
    assert abs(float(lag)) < 5 * (1 / 9 / count) ** 0.5, "neighbours, the words of one counter, are independent"

"""Masks and dropout on Triton: bit for bit those of torch_reference, whatever the shape, the key and the site."""

from __future__ import annotations

import random as pseudo

import pytest
import torch

from smedjan.backends.cuda_triton import random
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.torch_reference.random import keep_mask, uniform
from smedjan.ops.random import dropout
from tests.backends.cpu_native.fused_cases import Case
from tests.backends.cuda_triton.edited import edited
from tests.backends.cuda_triton.shapes import DTYPES, LAYOUTS, into, laid_out, numbered, shapes

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
KEYS = [(0, 0, 0, 0), (2**32 - 1,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]


def key_of(number: int, device: str) -> torch.Tensor:
    draw = pseudo.Random(number)
    words = KEYS[number] if number < len(KEYS) else [draw.getrandbits(32) for _ in range(4)]
    return torch.tensor(words, dtype=torch.int64, device=device)


@pytest.mark.parametrize(("number", "shape"), **numbered(shapes(31)))
def test_bits(rand, device, number, shape):
    draw = pseudo.Random(-number)
    attrs = {"p": draw.choice([0.0, 0.05, 0.3, 0.999]), "site": draw.choice([0, 1, 7, 211, 2**32 - 1])}
    key = key_of(number, device)
    mask = keep_mask(key.cpu(), shape=shape, **attrs).to(device)
    assert torch.equal(apply("keep_mask", key, shape=shape, **attrs), mask)
    x = laid_out(rand(*shape, dtype=DTYPES[number % 3]), LAYOUTS[number % 4])
    expected = (x * mask.to(x.dtype)) * (1.0 / (1.0 - attrs["p"]))
    assert torch.equal(apply("dropout", x, key, **attrs), expected)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 7), (2, 5, 1031)])
@pytest.mark.parametrize("number", range(4))
def test_uniform_bits(device, number, shape):
    attrs = {"bound": 0.0371, "site": (0, 211, 2**31, 2**32 - 1)[number]}
    key = key_of(number, device)
    expected = uniform(key.cpu(), shape=shape, **attrs).to(device)
    assert torch.equal(apply("uniform", key, shape=shape, **attrs), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_draws_the_same_mask(rand, device, dtype):
    case = Case(lambda x, key: dropout(x, key, p=0.4, site=3), {"x": rand(5, 33), "key": key_of(9, device)}, ("x",))
    case.check(RULES, "dropout", dtype)


def test_in_place_and_in_one_launch(rand, device):
    x, key = rand(5, 33), key_of(9, device)
    expected = apply("dropout", x, key, p=0.4, site=3)
    assert into("dropout", (x,), x, key, p=0.4, site=3) == ["keep"]
    assert torch.equal(x, expected)


def test_a_nan_that_is_dropped_stays_one(device):
    x = torch.full((64,), float("nan"), device=device)
    assert bool(apply("dropout", x, key_of(9, device), p=0.4, site=3).isnan().all())


def test_nothing(rand, device):
    assert apply("dropout", rand(0, 3), key_of(9, device), p=0.4, site=3).shape == (0, 3)


MUTATIONS = {
    "the site is ignored": ("none + site.to(tl.uint32)", "none"),
    "the step is ignored": ("none + tl.load(key + 2).to(tl.uint32)", "none"),
    "the micro-batch is ignored": ("none + tl.load(key + 3).to(tl.uint32)", "none"),
    "the seed's high word is ignored": ("none + tl.load(key + 1).to(tl.uint32)", "none"),
    "nine rounds": ("tl.static_range(10)", "tl.static_range(9)"),
    "words out of order": (
        "tl.interleave(word0, word2), tl.interleave(word1",
        "tl.interleave(word0, word1), tl.interleave(word2",
    ),
    "a mask of the other half": (">= threshold\n    index =", "< threshold\n    index ="),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_changes_bits(device, monkeypatch, tmp_path, name):
    key, attrs = key_of(9, device), {"shape": (5, 33), "p": 0.4, "site": 3}
    expected = keep_mask(key.cpu(), **attrs).to(device)
    assert torch.equal(apply("keep_mask", key, **attrs), expected)
    monkeypatch.setattr(random, "kernels", edited(random.kernels, *MUTATIONS[name], tmp_path))
    assert not torch.equal(apply("keep_mask", key, **attrs), expected)

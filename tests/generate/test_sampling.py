"""The distribution that a token is drawn from is the one that transformers' logits processors leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from smedjan.errors import ConfigError
from smedjan.generate import sampling as module
from smedjan.generate.sampling import Sampling, choose, warp

VOCAB = 61
SEEN = [3, 3, 17, 60, 0]

CHOICES = {
    "temperature": Sampling(temperature=0.7),
    "hot": Sampling(temperature=2.5),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_k of one": Sampling(temperature=1.0, top_k=1),
    "top_k of more than all": Sampling(temperature=1.0, top_k=500),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "a small top_p": Sampling(temperature=1.0, top_p=0.01),
    "top_p of one": Sampling(temperature=1.0, top_p=1.0),
    "min_p": Sampling(temperature=1.0, min_p=0.1),
    "min_p of one": Sampling(temperature=1.0, min_p=1.0),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.4),
    "a penalty that invites": Sampling(temperature=1.0, repetition_penalty=0.6),
    "all": Sampling(temperature=1.3, top_k=30, top_p=0.9, min_p=0.03, repetition_penalty=1.2),
    "top_p then min_p": Sampling(temperature=0.9, top_p=0.7, min_p=0.3),
}


def scores_of_theirs(logits: np.ndarray, sampling: Sampling, seen: list[int] = SEEN) -> torch.Tensor:
    """float32 [V] after GenerationMixin's processors in its order."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty is not None:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0]


def theirs(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities in float64."""
    return torch.softmax(scores_of_theirs(logits, sampling).double(), -1).numpy()


def measured(logits: np.ndarray, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Each token's exact share of [0, 1): bisects for the draws at which `choose` changes its mind."""
    at = 0.0

    class Generator:
        def __init__(self, _: object) -> None: ...

        def random(self) -> float:
            return at

    monkeypatch.setattr(module.np.random, "Generator", Generator)

    def token(draw: float) -> int:
        nonlocal at
        at = draw
        return choose(logits, SEEN, sampling, 0)

    shares, start = np.zeros(len(logits)), 0.0
    last = token(np.nextafter(1.0, 0.0))
    while True:
        here = token(start)
        if here == last:
            shares[here] += 1.0 - start
            return shares
        low, high = start, 1.0
        while np.nextafter(low, 1.0) < high:
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (middle, high) if token(middle) == here else (low, middle)
        shares[here] += high - start
        start = high


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CHOICES)
def test_distribution_is_transformers(name, seed, monkeypatch):
    logits = np.random.default_rng(seed).normal(scale=2.0, size=VOCAB).astype(np.float32)
    expected, found = theirs(logits, CHOICES[name]), measured(logits, CHOICES[name], monkeypatch)
    assert np.array_equal(found > 0, expected > 0)
    # Two roundings of a float32 score of size s move its probability by a relative 2 s 2^-24.
    largest = float(np.abs(logits).max()) / min(1.0, CHOICES[name].temperature) * 1.7
    assert np.abs(found - expected).max() <= 2 * largest * 2.0**-24


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHOICES)
def test_scores_are_transformers_to_the_bit(name, rounded):
    """A real vocabulary's size. Logits of bfloat16 hold many equals: where top-p ends between some, torch.sort,
    which is not stable, decides which of them go; as many must."""
    generator, sampling = np.random.default_rng(3), CHOICES[name]
    gone = 0
    for _ in range(3):
        logits = generator.normal(scale=3.0, size=49_152).astype(np.float32)
        if rounded:
            logits = torch.from_numpy(logits).bfloat16().float().numpy()
        seen = generator.integers(0, len(logits), size=200).tolist()
        found, expected = warp(logits, seen, sampling), scores_of_theirs(logits, sampling, seen).numpy()
        differ = found.view(np.int32) != expected.view(np.int32)
        if rounded:
            edge = found[np.isfinite(found)].min()
            assert np.isin(np.maximum(found, expected)[differ], edge).all()
            assert np.array_equal(np.sort(found), np.sort(expected))
        else:
            assert not differ.any()
        gone += int(np.isneginf(found).sum())
    cuts = sampling.min_p is not None or (sampling.top_p or 1) < 1 or (sampling.top_k or len(logits)) < len(logits)
    assert (gone > 0) == cuts


def test_draws_follow_the_distribution():
    """Frequencies of 4,000 steps' draws: each within five standard deviations."""
    logits, sampling = np.log(np.array([0.5, 0.25, 0.2, 0.05], dtype=np.float32)), Sampling(temperature=1.0, seed=8)
    count = 4000
    draws = np.bincount([choose(logits, [], sampling, step) for step in range(count)], minlength=4) / count
    expected = np.array([0.5, 0.25, 0.2, 0.05])
    assert (np.abs(draws - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_greedy_takes_the_first_of_equals():
    assert choose(np.array([1.0, 5.0, 5.0, 0.0], dtype=np.float32), [], Sampling(), 0) == 1


def test_logits_are_left_as_they_were():
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    before = logits.copy()
    choose(logits, SEEN, CHOICES["all"], 0)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range_are_errors(field, value):
    with pytest.raises(ConfigError, match="out of range") as caught:
        Sampling(**{field: value})
    assert caught.value.field == field

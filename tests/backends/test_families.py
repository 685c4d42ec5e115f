"""Every family on the fast backends: logits, gradients and cached decode are as near the truth as transformers' own.

The truth is transformers' model of the same weights in float64, e = |value - truth| / |truth| in Euclidean norms. Over
the tensors of a mode (all gradients; all decoded steps), held is their root mean square:

    rms(e_ours) <= 2 rms(e_transformers) + 2 u

That is FlashAttention's criterion for the model as a whole: e of one tensor is a single draw of what it inherits from
all layers, and bounds nothing by itself where the plain computation was lucky (the gradient of a key's bias is zero but
for rounding). A wrong op stands out: it moves a tensor by 1e-3 and more, where e is 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest

from smedjan.hf import parity
from smedjan.hf.peer import Peer, feeds
from tests.families import ALL, CASES, make_model, make_session_of

FIRST = [(family, next(iter(cases))) for family, cases in CASES.items()]
INTERPRETED = (("gemma2", "plain"), ("cohere2", "plain"), ("phi3", "partial"), ("glm", "plain"), ("gpt2", "plain"))
"""Those that run in Triton's interpreter, which is slow: each norm, rotation and activation once, in two layers."""
ROUNDS = [
    *(("cpu_native", "float32", *pair) for pair in ALL),
    *(("cpu_native", "bfloat16", *pair) for pair in FIRST),
    *(("mlx_metal", "float32", *pair) for pair in FIRST),
    *(("mlx_metal", "float32", "llama", case) for case in CASES["llama"] if case.startswith("rope")),
    *(("mlx_metal", "bfloat16", *pair) for pair in FIRST),
    *(("cuda_triton", "float32", *pair) for pair in INTERPRETED),
]


def rms(held: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(held))))


def errors(made: parity.Made, truth: parity.Made, mode: str) -> list[float]:
    """e of each tensor. The loss is held by the logits that it is computed from; a gradient that is zero but for
    float64's own rounding (the bias of keys that are not rotated) has no relative error."""
    found = []
    largest = max(float(np.linalg.norm(reference)) for reference in truth[mode].values())
    for name, reference in truth[mode].items():
        if name != "loss" and np.linalg.norm(reference) > 2.0**-40 * largest:
            value = made[mode].get(name, np.zeros_like(reference))
            found.append(parity._relative(value, reference))
    return found


@pytest.mark.parametrize(("on", "dtype", "family", "case"), ROUNDS, ids=lambda value: value)
def test_as_near_the_truth_as_transformers(on, dtype, family, case):
    settings, paddings = CASES[family][case], ("none", "left")
    if on == "cuda_triton":
        settings, paddings = {**settings, "n_layer" if family == "gpt2" else "num_hidden_layers": 2}, ("left",)
    model = make_model(family, settings, dtype=dtype, attention="eager")
    session, peer = make_session_of(model, attention="eager", on=on), Peer(model)
    truth = peer.widened()
    for padding in paddings:
        batch = parity._rows(session.config, padding, 0, 12)
        prefills = parity._prefills(session.config, 128)
        script = list(feeds(batch, prefills))
        ours, theirs, reference = (
            parity._real(made, batch, script)
            for made in (
                parity._ours(session, batch, script),
                peer.run(batch, prefills),
                truth.run(batch, prefills),
            )
        )
        for mode in ("logits", "gradients", "decode"):
            found, plain = (rms(errors(made, reference, mode)) for made in (ours, theirs))
            most = 2 * plain + 2 * parity.ROUNDOFF[dtype]
            assert found <= most, f"{mode}, padding {padding}: {found:.3e} > {most:.3e}"

"""Issue 5, Shows: "20 training steps of tiny models, full, LoRA and QLoRA, packed, under the interpreter: loss and
gradient norms within bound of `torch_reference`."

The truth is the same run in float64. Steps feed on each other's errors, so that one of them is a single draw: the whole
curve is held to twice the most by which torch_reference's float32 curve is away from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smedjan.backends.torch_reference import TorchReference
from smedjan.checkpoint import nf4
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from smedjan.train.step import Trainer
from tests.backends.cpu_native.fused_cases import Float64
from tests.backends.cpu_native.tiny_llama import batch_of
from tests.backends.cuda_triton.conftest import DEVICE
from tests.backends.family_runs import Truth
from tests.conftest import make_peer, make_session
from tests.tolerances import UNIT_ROUNDOFF

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the sessions' arrays are on the CPU")
STEPS = 20
LORA = Lora(
    rank=4,
    alpha=8.0,
    dropout=0.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
RATES = {"full": 3e-3, "lora": 2e-2, "qlora": 2e-2}


def session_of(method: str, on: Any) -> Session:
    """A Llama of one layer; with adapters, whose B is no longer zero."""
    session = make_session(make_peer(num_hidden_layers=1, num_key_value_heads=2))
    session.backend = on
    if method != "full":
        session.lora = LORA
        generator = torch.Generator().manual_seed(4)
        for name, shape in LORA.shapes(session.config.parameter_shapes()).items():
            session.parameters[name] = torch.randn(shape, generator=generator) * 0.1
    if method == "qlora":
        session.quantized = session.config.linear_weights()
        to_raw, from_raw = TorchReference().to_raw, TorchReference().from_raw
        for name in session.quantized:
            stored = nf4.quantize(to_raw(session.parameters.pop(name)))
            session.parameters |= {f"{name}.{suffix}": from_raw(part) for suffix, part in stored.items()}
    if isinstance(on, Float64):
        wide = {
            name: array.double() if array.ndim and array.is_floating_point() else array
            for name, array in session.parameters.items()
            if "absmax" not in name
        }
        session.parameters |= wide
    return session


def curve(method: str, on: Any) -> np.ndarray:
    """[steps, 2]: loss and gradient norm."""
    session = session_of(method, on)
    names = [name for name in session.parameters if session.lora is None or ".lora_" in name]
    trainer = Trainer(session, names, AdamW(clip=1.0, weight_decay=0.01))
    made = []
    for number in range(1, STEPS + 1):
        batches = [batch_of("packed", seed=1 + number % 3), batch_of("packed", seed=4 + number % 2)]
        made.append(trainer.step(batches if number % 5 == 0 else batches[:1], number=number, lr=RATES[method]))
    return np.array(made)


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "qlora"))]
)
def test_twenty_packed_steps(method):
    truth, reference = curve(method, Truth()), curve(method, TorchReference())
    found = curve(method, backend("cuda_triton"))
    assert truth[-1, 0] < 0.8 * truth[0, 0], "it learns"
    spread = np.abs(reference - truth).max(axis=0)
    bound = 2 * spread + 2 * UNIT_ROUNDOFF[torch.float32] * np.abs(truth).max(axis=0)
    off = np.abs(found - truth).max(axis=0)
    assert (off <= bound).all(), f"loss and norm are {off} away, bound {bound}"

"""A planned program computes what its ops one by one compute, to the bit, in buffers that never collide; and once it
has run, it starts the same launches again and asks for no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smedjan.backends.cuda_triton.cuda import CudaTriton
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned import buffers
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.graph.program import Program
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Session
from smedjan.train.step import Trainer
from tests.backends.cpu_native.tiny_llama import batch_of, session_on, trained
from tests.backends.cuda_triton.conftest import DEVICE
from tests.conftest import make_batch
from tests.families import CASES, make_model, make_session_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the sessions' arrays are on the CPU")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = Lora(rank=3, alpha=6.0, dropout=0.0, targets=TARGETS)
SOME = Lora(rank=3, alpha=6.0, dropout=0.3, targets=("q_proj", "v_proj", "down_proj"))


class Twice(CudaTriton):
    """Runs every program planned, on an arena that begins as NaN, and op by op, and holds the two together."""

    def program(self, graph: Any, pool: Any = None) -> Any:
        planned = super().program(graph, pool)
        return _Both(planned, Program(planned.graph, RULES))


class _Both:
    def __init__(self, planned: PlannedProgram, plain: Program) -> None:
        self.planned, self.plain = planned, plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.planned, name)

    def __call__(self, inputs: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        copies = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        arena = self.planned.pool.arena_of(self.planned.plan.arena)
        arena.fill_(0xFF)  # NaN in every float type
        made = self.planned(inputs, **options)
        expected = self.plain(copies)
        assert buffers.overlaps(self.planned.plan.stores) == []
        for name, value in expected.items():
            assert torch.equal(made[name], value.reshape(made[name].shape)), name
        return made


def step(session: Session, kind: str) -> None:
    """Logits, a micro-batch, another one added to it, an update."""
    names, batch = trained(session), batch_of(kind)
    session.logits(batch)
    _, totals = session.micro(batch, names, num_items=9, dropout_key=(1, 2, 3, 4))
    session.micro(batch, names, num_items=9, totals=totals, dropout_key=(1, 2, 3, 5))


ROUNDS = [
    ("none", None, "float32"),
    ("left", LORA, "float32"),
    ("packed", LORA, "bfloat16"),
    ("packed", SOME, "float32"),
    ("right", None, "bfloat16"),
]
"""Each kind of batch, method and dtype: the interpreter takes seconds for each."""


@pytest.mark.parametrize(("kind", "lora", "dtype"), ROUNDS, ids=["full", "lora", "lora-bf16", "dropout", "bf16"])
def test_planned_is_op_by_op(kind, lora, dtype):
    step(session_on(Twice(), dtype=dtype, lora=lora, num_hidden_layers=1), kind)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "cohere", "olmo2", "glm4"])
def test_planned_is_op_by_op_in_families_that_differ(family):
    """Head norms, norms behind each part, fused projections, parallel blocks, learned positions, interleaved ropes."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = make_model(family, {**next(iter(CASES[family].values())), layers: 1}, attention="eager")
    session = make_session_of(model, attention="eager")
    session.backend = Twice()
    step(session, "left")


class Functions(TorchDispatchMode):
    """Names of the aten functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


IN_PLACE = {"aten.mm.out", "aten.addmm.out", "aten.zero_.default", "aten.copy_.default"}
"""What a list of launches may call besides its kernels: each writes into an array that it is given."""


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_step_starts_the_same_launches_again_and_allocates_nothing(monkeypatch, lora):
    session = session_on(CudaTriton(), lora=lora, num_hidden_layers=1)
    trainer = Trainer(session, trained(session), AdamW(clip=1.0))
    ran: list[list[str]] = []

    def listed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: PlannedProgram, *args: Any, **kwargs: Any) -> Any:
            made = run(self, *args, **kwargs)
            ran[-1] += [call.name for call in self._calls]
            return made

        return call

    monkeypatch.setattr(PlannedProgram, "__call__", listed(PlannedProgram.__call__))
    allocations = []
    for number in range(1, 4):
        ran.append([])
        trainer.step([batch_of("packed", 1), batch_of("packed", 2)], number=number, lr=1e-3)
        allocations.append(session._pools["cuda_triton"].allocations)
    assert ran[0] == ran[1] == ran[2]
    assert len(ran[0]) > 40
    assert allocations[1] == allocations[2], "the second step moves what the update wants together"
    for program in [*session.programs.values(), trainer.update]:
        libraries = [call for call in program._calls if not call.grid]
        with Functions() as functions:
            for call in libraries:
                call()
        assert functions.seen <= IN_PLACE


def test_what_is_planned_is_what_runs():
    """The launches that are written down without memory are those that run, argument for argument but the arrays."""
    session = session_on(CudaTriton(), lora=LORA, num_hidden_layers=1)
    session.micro(batch_of("packed"), trained(session), num_items=9)
    (program,) = session.programs.values()
    planned, bound = program.recorded(), program._calls
    assert [(call.name, call.grid) for call in planned] == [(call.name, call.grid) for call in bound]
    for one, other in zip(planned, bound, strict=True):
        for left, right in zip(one.args, other.args, strict=True):
            if isinstance(left, torch.Tensor):
                assert (left.shape, left.stride(), left.dtype) == (right.shape, right.stride(), right.dtype)
            else:
                assert left == right


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_less_memory_gives_the_same_bits(lora):
    """Recomputed, in a session of its own; tests/graph/test_recompute.py has every tier."""
    whole = session_on(CudaTriton(), lora=lora)
    batch, names = make_batch("none", seq=24), trained(whole)
    loss, grads = whole.micro(batch, names, num_items=9)
    (program,) = whole.programs.values()
    given = sum(tensor.nbytes for tensor in program.graph.inputs.values())
    tight = session_on(CudaTriton(), lora=lora)
    tight.memory = given + int(0.75 * (program.peak_bytes - given))
    again, same = tight.micro(batch, names, num_items=9)
    (fitted,) = tight.programs.values()
    assert fitted.memory()
    assert fitted.peak_bytes <= tight.memory
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], grads[name]) for name in names)


def test_arrays_that_lie_elsewhere_are_bound_anew():
    session = session_on(CudaTriton(), num_hidden_layers=1)
    batch, names = batch_of("none"), trained(session)
    loss, grads = session.micro(batch, names, num_items=9)
    kept = {name: grad.clone() for name, grad in grads.items()}
    session.parameters = {name: array.clone() for name, array in session.parameters.items()}
    again, grads = session.micro(batch, names, num_items=9)
    assert torch.equal(loss, again)
    assert all(torch.equal(kept[name], grads[name]) for name in names)


@pytest.mark.parametrize("seed", range(20))
def test_settled_stores_never_meet(seed):
    generator = np.random.default_rng(seed)
    stores = []
    for _ in range(200):
        first = int(generator.integers(0, 100))
        last = first + int(generator.integers(0, 30))
        stores.append(buffers.Store(buffers.ARENA, torch.float32, int(generator.integers(0, 5000)), first, last))
    size = buffers.settle(stores)
    assert buffers.overlaps(stores) == []
    alive = max(sum(s.nbytes for s in stores if s.first <= position <= s.last) for position in range(130))
    assert alive <= size <= 1.5 * alive + 200 * buffers.ALIGNMENT


def test_a_pool_keeps_what_it_gave():
    pool = Pool(torch.device("cpu"))
    one = pool.output("grad.x", (3,), torch.float32)
    assert pool.output("grad.x", (3,), torch.float32) is one
    assert pool.output("grad.x", (4,), torch.float32) is not one
    small = pool.arena_of(10)
    assert pool.arena_of(5) is small
    assert pool.arena_of(20) is not small

"""Every kernel is built for four architectures, as its launcher starts it, and keeps its budget.

The builds run in a process of their own, since this one may interpret its kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
import triton
from torch import Tensor

from smedjan.backends.cuda_triton import aot, budgets, glu, loss, norm, optimizer, rope
from smedjan.errors import BackendError

KERNELS = {
    "norm.rms_norm_fwd",
    "norm.rms_norm_bwd",
    "norm.rms_norm_dw",
    "norm.layer_norm_fwd",
    "norm.layer_norm_bwd",
    "norm.column_sum",
    "rope.rope",
    "glu.glu_fwd",
    "glu.glu_bwd",
    "loss.cross_entropy",
    "optimizer.adamw",
    "optimizer.square_sum",
    "optimizer.root_of_sum",
}

SCRIPT = """
import json
from dataclasses import asdict
from smedjan.backends.cuda_triton import aot

def chosen():
    seen = set()
    for case in aot.matrix():
        if case.cc == 90 or (case.kernel, case.cc) not in seen:
            yield case
        seen.add((case.kernel, case.cc))

if __name__ == "__main__":
    print(json.dumps({key: asdict(found) for key, found in aot.measure_all(list(chosen())).items()}))
"""
"""All builds for sm_90, one of each kernel for the others: `make kernels` makes them all."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, budgets.Resources]:
    script = tmp_path_factory.mktemp("aot") / "build.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {key: budgets.Resources(**found) for key, found in json.loads(done.stdout).items()}


def test_every_kernel_builds_for_every_architecture(built):
    made = defaultdict(set)
    for key in built:
        made[key.split(" ")[0]].add(key.rsplit("sm_", 1)[1])
    assert made == {kernel: {"80", "90", "100", "120"} for kernel in KERNELS}
    assert all(found.registers > 0 for found in built.values())


def test_nothing_spills_on_sm_90(built):
    hopper = [found for key, found in built.items() if key.endswith("sm_90")]
    assert len(hopper) == len(aot.matrix((90,)))
    assert all(found.spilled == found.local_accesses == 0 for found in hopper)


def test_every_tensor_is_read_and_written_16_bytes_at_a_time(built):
    """Except the last stage of a norm, which reads at most a few thousand partial sums that lie anywhere."""
    for key, found in built.items():
        if key.endswith("sm_90") and not key.startswith("optimizer.root_of_sum"):
            assert found.wide_loads, f"{key} has no 128-bit load"
    for kernel in ("norm.rms_norm_fwd", "norm.layer_norm_fwd", "rope.rope", "glu.glu_fwd", "optimizer.adamw"):
        assert all(f.wide_stores for key, f in built.items() if key.startswith(kernel) and key.endswith("sm_90"))


def test_budgets_hold(built):
    release, recorded = budgets.read()
    of_these = {key: budget for key, budget in recorded.items() if key in built}
    assert budgets.breaches(built, of_these, release=triton.__version__, recorded_release=release) == []


def test_there_is_a_budget_for_each_build_and_none_besides():
    keys = [case.key for case in aot.matrix()]
    assert len(keys) == len(set(keys))
    assert set(keys) == budgets.read()[1].keys()


def test_building_while_interpreting_is_an_error_that_says_so(device):
    if device == "cuda":
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(BackendError, match=r"TRITON_INTERPRET.*unset it"):
        aot.build(aot.matrix((90,))[0])


@dataclass
class Launches:
    """In a kernel's place: notes what a launcher starts it with, and starts nothing."""

    kernel: str
    names: list[str]
    seen: list[tuple[str, dict[str, object]]]

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(size > 0 for size in grid)

        def launch(*args: object, **kwargs: object) -> None:
            self.seen.append((self.kernel, dict(zip(self.names, args, strict=False)) | kwargs))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    seen: list[tuple[str, dict[str, object]]] = []
    for kernel in KERNELS:
        module, name = kernel.split(".")
        home = import_module(f"smedjan.backends.cuda_triton.kernels.{module}")
        monkeypatch.setattr(home, name, Launches(kernel, getattr(home, name).arg_names, seen))
    return seen


TYPES = {torch.float32: aot.F32, torch.bfloat16: aot.BF16, torch.int64: aot.I64}


UNSPECIALISED = {"rows", "blocks", "heads", "tokens", "ignore_index", "first", "count"}
"""Integers from whose value Triton learns nothing."""


def matches(case: aot.Build, launch: dict[str, object]) -> bool:
    """Whether Triton would compile this launch to that build: types, constants, and integers' divisibility by 16."""
    if launch["num_warps"] != case.num_warps or launch["enable_fp_fusion"] is not True:
        return False
    if any(launch[name] != value for name, value in case.constants.items()):
        return False
    for name, value in case.arguments.items():
        given = launch[name]
        if isinstance(given, Tensor):
            if value != TYPES[given.dtype]:
                return False
        elif isinstance(given, int) and isinstance(value, int):
            if (given % 16 == 0) != (value % 16 == 0) and name not in UNSPECIALISED:
                return False
        elif type(given) is not type(value):
            return False
    return True


def start_everything(device: str) -> None:
    """One launch for each kind of build in `aot.matrix`."""
    f32, bf16 = torch.float32, torch.bfloat16

    def zeros(*shape: int, dtype: torch.dtype = f32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    for width, dtype in [(128, bf16), (576, bf16), (4096, bf16), (8192, bf16), (16384, bf16)] + [
        (width, f32) for width in (576, 8192, 16384)
    ]:
        x, weight, rstd = zeros(3, width, dtype=dtype), zeros(width, dtype=dtype), zeros(3)
        for cast in ("before", "after"):
            norm.rms_norm(x, weight, eps=1e-5, weight_cast=cast)
        for acc, needs in ((x, (True, True)), (None, (True, True)), (x, (True, False)), (None, (False, True))):
            norm.rms_norm_bwd(x, weight, rstd, x, acc, needs=needs, eps=1e-5)
    for width, dtype in ((768, bf16), (8192, bf16), (768, f32), (8192, f32)):
        x, weight, rstd = zeros(3, width, dtype=dtype), zeros(width, dtype=dtype), zeros(3)
        for bias in (weight, None):
            norm.layer_norm(x, weight, bias, eps=1e-5)
        for needs in ((True, True, True), (True, False, False)):
            norm.layer_norm_bwd(x, weight, rstd, rstd, x, needs=needs)
    for dim, width, dtype, tokens in (
        (64, 64, bf16, 1024),
        (128, 128, bf16, 1024),
        (128, 128, bf16, 1),
        (64, 64, f32, 1024),
        (128, 128, f32, 1024),
        (96, 128, bf16, 1024),
        (64, 128, bf16, 1024),
    ):
        x, table = zeros(1, tokens, 32, width, dtype=dtype).transpose(1, 2), zeros(1, tokens, dim, dtype=dtype)
        for inverse in (False, True):
            for interleaved in (False, True):
                rope.rope(x, table, table, interleaved=interleaved, inverse=inverse)
    for dtype in (f32, bf16):
        stacked = zeros(2, 3072, dtype=dtype)
        glu.glu(stacked[:, :1536], stacked[:, 1536:])
        for act in ("gelu", "gelu_new", "relu", "relu2"):
            glu.glu(stacked[:, :1536], stacked[:, 1536:], act=act)
            glu.glu_bwd(stacked[:, :1536], stacked[:, 1536:], stacked[:, :1536], needs=(True, True), act=act)
        for needs in ((True, True), (True, False), (False, True)):
            glu.glu_bwd(stacked[:, :1536], stacked[:, 1536:], stacked[:, :1536], needs=needs)
        logits, labels = zeros(2, 49152, dtype=dtype), zeros(2, dtype=torch.int64)
        loss.cross_entropy(logits, labels)
        loss.cross_entropy_bwd(logits, labels, zeros(2), zeros(1))
        head = zeros(49152, 16, dtype=dtype)
        for cap in (0.0, 30.0):
            loss.linear_cross_entropy(zeros(2, 16, dtype=dtype), head, labels, zeros(1), needs=(True, False), cap=cap)
        optimizer.global_norm(zeros(32, 32, dtype=dtype))
        for scale in (None, zeros(1)):
            param, master = zeros(32, 32, dtype=dtype), None if dtype == f32 else zeros(32, 32)
            optimizer.adamw_update(
                param,
                param,
                zeros(32, 32),
                zeros(32, 32),
                lr=1e-3,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                bias_correction1=0.5,
                bias_correction2=0.5,
                grad_scale=scale,
                master=master,
            )


def test_what_is_built_is_what_is_launched(launches, device):
    start_everything(device)
    for case in aot.matrix((90,)):
        same = [launch for kernel, launch in launches if kernel == case.kernel]
        assert any(matches(case, launch) for launch in same), f"no launcher starts {case.key}"

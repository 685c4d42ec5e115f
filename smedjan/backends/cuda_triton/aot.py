"""Ahead-of-time builds of every Triton kernel, on a machine without a GPU, and what they cost.

`python -m smedjan.backends.cuda_triton.aot` builds each kernel as its launcher would start it (`matrix`) for sm_80
(A100), sm_90 (H100), sm_100 (B200) and sm_120 (RTX 50), prints registers, spills, shared memory and 128-bit accesses,
and fails where a budget is broken; `--update` makes what it found the budget. `cuobjdump` and `nvdisasm` come with the
triton package.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from smedjan.backends.cuda_triton import budgets
from smedjan.backends.cuda_triton.budgets import Resources
from smedjan.backends.cuda_triton.kernels import common
from smedjan.errors import BackendError

CAPABILITIES = (80, 90, 100, 120)
"""Compute capabilities built for, times ten."""

SASS_CAPABILITY = 90
"""The one whose machine code is read: half a second a kernel, and its access widths are the same on the others."""

F32, BF16, I64 = "*fp32", "*bf16", "*i64"

Argument = str | int | float | None
"""What the launcher gives: a pointer type, an integer (for what Triton learns from its value), a float, or None."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel as a launch wants it."""

    kernel: str
    """Module and function under `kernels/`: "norm.rms_norm_fwd"."""
    variant: str
    arguments: Mapping[str, Argument]
    constants: Mapping[str, int | bool | str]
    """Its tl.constexpr parameters."""
    num_warps: int
    cc: int = 0

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.variant} sm_{self.cc}"


def _pointers(dtype: str | None, names: str) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), dtype)


def _case(
    kernel: str, variant: str, tile: common.Tile, arguments: Mapping[str, Argument], **constants: int | bool | str
) -> Build:
    sizes = {"COLS": tile.cols} | ({"ROWS": tile.rows} if tile.rows > 1 or kernel.startswith(("norm", "rope")) else {})
    return Build(
        kernel=kernel, variant=variant, arguments=arguments, constants=sizes | constants, num_warps=tile.num_warps
    )


def _norm_cases() -> Iterable[Build]:
    for dtype, name, width, before in (
        (BF16, "bf16", 128, True),
        (BF16, "bf16", 576, True),
        (BF16, "bf16", 576, False),
        (BF16, "bf16", 4096, True),
        (BF16, "bf16", 16384, True),
        (F32, "f32", 576, True),
        (F32, "f32", 16384, True),
    ):
        arguments = _pointers(dtype, "x weight y") | _pointers(F32, "rstd")
        arguments |= {"x_stride": width, "rows": 1, "width": width, "eps": 1e-5, "offset": 0.0}
        variant = f"{name} {width} {'before' if before else 'after'}"
        yield _case("norm.rms_norm_fwd", variant, common.norm_tile(width), arguments, CAST_BEFORE=before)
    for dtype, name, width, wanted in (
        (BF16, "bf16", 128, "dx dw"),
        (BF16, "bf16", 576, "acc dx dw"),
        (BF16, "bf16", 576, "acc dx"),
        (BF16, "bf16", 4096, "acc dx dw"),
        (BF16, "bf16", 8192, "acc dx dw"),
        (F32, "f32", 576, "acc dx dw"),
        (F32, "f32", 8192, "acc dx dw"),
        (F32, "f32", 16384, "acc dx"),
    ):
        arguments = _pointers(dtype, "x weight dy dx") | _pointers(F32, "rstd")
        arguments |= {"acc": dtype if "acc" in wanted else None, "partial": F32 if "dw" in wanted else None}
        arguments |= {"x_stride": width, "dy_stride": width, "acc_stride": width if "acc" in wanted else 0}
        arguments |= {"rows": 1, "width": width, "offset": 0.0}
        yield _case("norm.rms_norm_bwd", f"{name} {width} {wanted}", common.norm_bwd_tile(width), arguments)
    for dtype, name in ((BF16, "bf16"), (F32, "f32")):
        arguments = _pointers(dtype, "x dy") | _pointers(F32, "rstd partial")
        arguments |= {"x_stride": 16384, "dy_stride": 16384, "rows": 1, "width": 16384}
        yield _case("norm.rms_norm_dw", f"{name} 16384", common.column_tile(), arguments)
        arguments = _pointers(F32, "partial") | _pointers(dtype, "out") | {"rows": 1, "width": 576}
        yield _case("norm.column_sum", f"{name} 576", common.column_tile(), arguments)


def _layer_norm_cases() -> Iterable[Build]:
    for dtype, name, width, biased in (
        (BF16, "bf16", 768, True),
        (BF16, "bf16", 8192, False),
        (F32, "f32", 768, True),
        (F32, "f32", 8192, True),
    ):
        arguments = _pointers(dtype, "x weight y") | {"bias": dtype if biased else None} | _pointers(F32, "mean rstd")
        arguments |= {"x_stride": width, "rows": 1, "width": width, "eps": 1e-5}
        variant = f"{name} {width}{' bias' if biased else ''}"
        yield _case("norm.layer_norm_fwd", variant, common.norm_tile(width), arguments)
    for dtype, name, width, wanted in (
        (BF16, "bf16", 768, "dx dw db"),
        (BF16, "bf16", 768, "dx"),
        (BF16, "bf16", 8192, "dx dw db"),
        (F32, "f32", 768, "dx dw db"),
        (F32, "f32", 8192, "dx dw db"),
    ):
        arguments = _pointers(dtype, "x weight dy dx") | _pointers(F32, "mean rstd")
        arguments |= {f"{sum_}_partial": F32 if sum_ in wanted.split() else None for sum_ in ("dw", "db")}
        arguments |= {"x_stride": width, "dy_stride": width, "rows": 1, "width": width}
        yield _case("norm.layer_norm_bwd", f"{name} {width} {wanted}", common.norm_bwd_tile(width), arguments)


def _rope_cases() -> Iterable[Build]:
    for dtype, name, dim, width, order, inverse, tokens in (
        (BF16, "bf16", 64, 64, "halves", False, 2048),
        (BF16, "bf16", 64, 64, "halves", True, 2048),
        (BF16, "bf16", 128, 128, "halves", True, 2048),
        (BF16, "bf16", 128, 128, "halves", False, 1),
        (F32, "f32", 64, 64, "halves", False, 2048),
        (F32, "f32", 128, 128, "halves", True, 2048),
        (BF16, "bf16", 96, 128, "halves", False, 2048),
        (BF16, "bf16", 128, 128, "pairs", False, 2048),
        (BF16, "bf16", 64, 128, "pairs", True, 2048),
        (F32, "f32", 128, 128, "pairs", False, 2048),
    ):
        arguments = _pointers(dtype, "x cos sin y")
        for tensor in "xy":
            arguments |= {f"{tensor}_batch": tokens * 32 * width, f"{tensor}_head": width}
            arguments |= {f"{tensor}_token": 32 * width}
        arguments |= {"cos_batch": 0, "cos_token": dim, "sin_batch": 0, "sin_token": dim}
        arguments |= {"heads": 32, "tokens": tokens, "half": dim // 2, "rest": width - dim}
        heads = common.rope_heads(32, tokens)
        part = str(dim) if dim == width else f"{dim} of {width}"
        variant = f"{name} {part} {order} {'inverse' if inverse else 'forward'} {heads} heads"
        constants = {"INTERLEAVED": order == "pairs", "INVERSE": inverse, "HEADS": heads}
        rest = common.next_power_of_2(width - dim) if width > dim else 0
        yield _case("rope.rope", variant, common.rope_tile(dim), arguments, **constants, REST=rest)


def _glu_cases() -> Iterable[Build]:
    for dtype, name in ((BF16, "bf16"), (F32, "f32")):
        arguments = _pointers(dtype, "gate up y")
        arguments |= {"gate_stride": 3072, "up_stride": 3072, "width": 1536, "blocks": 2}
        yield _case("glu.glu_fwd", f"{name} 1536 of 3072 silu", common.flat_tile(), arguments, ACT="silu")
        for wanted in ("dgate dup", "dgate", "dup") if dtype == BF16 else ("dgate dup",):
            arguments = _pointers(dtype, "gate up dy") | _pointers(None, "dgate dup") | _pointers(dtype, wanted)
            arguments |= {"gate_stride": 1536, "up_stride": 1536, "dy_stride": 1536, "width": 1536, "blocks": 2}
            yield _case("glu.glu_bwd", f"{name} 1536 {wanted} silu", common.flat_tile(), arguments, ACT="silu")
    for act in ("gelu", "gelu_tanh", "relu", "relu2"):
        arguments = _pointers(BF16, "gate up y")
        arguments |= {"gate_stride": 1536, "up_stride": 1536, "width": 1536, "blocks": 2}
        yield _case("glu.glu_fwd", f"bf16 1536 {act}", common.flat_tile(), arguments, ACT=act)
        arguments = _pointers(BF16, "gate up dy dgate dup")
        arguments |= {"gate_stride": 1536, "up_stride": 1536, "dy_stride": 1536, "width": 1536, "blocks": 2}
        yield _case("glu.glu_bwd", f"bf16 1536 dgate dup {act}", common.flat_tile(), arguments, ACT=act)


def _loss_cases() -> Iterable[Build]:
    for dtype, name, passes in (
        (BF16, "bf16", "forward"),
        (BF16, "bf16", "backward"),
        (BF16, "bf16", "forward backward"),
        (F32, "f32", "forward backward"),
        (BF16, "bf16", "forward backward capped"),
        (F32, "f32", "forward backward capped"),
    ):
        forward, backward, capped = ("forward" in passes, "backward" in passes, "capped" in passes)
        arguments = _pointers(dtype, "logits") | {"labels": I64, "loss": F32 if forward else None}
        arguments |= {"lse": None if forward and backward else F32, "scale": F32 if backward else None, "factor": 1.0}
        arguments |= {"gain": 1.0, "cap": 0.0}
        arguments |= {"stride": 49152, "vocab": 49152, "ignore_index": -100}
        tile = common.vocab_tile(49152)
        variant = f"{name} 49152 {passes}"
        constants = {"CAPPED": capped, "FORWARD": forward, "BACKWARD": backward}
        yield _case("loss.cross_entropy", variant, tile, arguments, **constants)


def _optimizer_cases() -> Iterable[Build]:
    scalars = ("decay", "one_minus_beta1", "beta2", "one_minus_beta2", "root_correction2", "step_size", "eps")
    for variant, dtype, master, scale in (
        ("f32", F32, None, None),
        ("f32 clipped", F32, None, F32),
        ("bf16 master clipped", BF16, F32, F32),
    ):
        arguments = _pointers(dtype, "param grad") | _pointers(F32, "exp_avg exp_avg_sq")
        arguments |= {"master": master, "grad_scale": scale, "numel": 576 * 576} | dict.fromkeys(scalars, 0.5)
        yield _case("optimizer.adamw", variant, common.flat_tile(), arguments)
    tile = common.square_sum_tile()
    for dtype, name in ((BF16, "bf16"), (F32, "f32")):
        arguments = {"grad": dtype, "partial": F32, "numel": 576 * 576, "first": 0}
        yield _case("optimizer.square_sum", name, tile, arguments)
    yield _case("optimizer.root_of_sum", "f32", tile, {"partial": F32, "out": F32, "count": 1})


def matrix(capabilities: Iterable[int] = CAPABILITIES) -> list[Build]:
    """Every kernel, in the dtypes and at the widths of SmolLM2-135M, Llama 8B and the widest, for each architecture.

    `arguments` are those of a real launch (a test holds the two together), so that what is built is what runs.
    """
    cases = [
        *_norm_cases(),
        *_layer_norm_cases(),
        *_rope_cases(),
        *_glu_cases(),
        *_loss_cases(),
        *_optimizer_cases(),
    ]
    return [replace(case, cc=cc) for cc in capabilities for case in cases]


def build(case: Build) -> CompiledKernel:
    """Compile down to a cubin, specialised as Triton does at a launch with 16-byte aligned tensors."""
    module, name = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"smedjan.backends.cuda_triton.kernels.{module}"), name)
    if not isinstance(kernel, triton.JITFunction):
        raise BackendError(
            "kernels cannot be built while Triton interprets them", field="TRITON_INTERPRET", remedy="unset it"
        )
    assert set(kernel.arg_names) == case.arguments.keys() | case.constants.keys(), f"{case.key}: {kernel.arg_names}"
    signature: dict[str, str] = {}
    constants: dict[str, int | bool | str | None] = dict(case.constants)
    attributes: dict[tuple[int, ...], list[list[str | int]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = case.arguments.get(parameter.name)
        if value is None:
            signature[parameter.name] = "constexpr"
            constants.setdefault(parameter.name, None)
            continue
        signature[parameter.name] = value if isinstance(value, str) else "fp32" if isinstance(value, float) else "i32"
        whole = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, str) or whole:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.cc, 32), options=options)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools in the triton package."""
    path = importlib.resources.files("triton.backends.nvidia") / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{name} failed: {done.stderr.strip()}", file=str(path), remedy="reinstall triton")
    return done.stdout


def resources(cubin: bytes, *, dynamic_shared: int = 0, sass: bool = True) -> Resources:
    """Read a cubin: cuobjdump's resource usage and, with `sass`, counts of nvdisasm's instructions.

    `dynamic_shared` is the launch's shared memory in bytes, which the cubin does not say (`metadata.shared`).
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", str(file))))
        code = _tool("nvdisasm", "-c", str(file)) if sass else None
    # The cubin's SHARED is static memory and the hardware's reserve: Triton's is asked for at the launch.
    found = Resources(
        registers=int(usage["REG"]), spilled=int(usage["STACK"]) + int(usage["LOCAL"]), shared=dynamic_shared
    )
    if code is None:
        return found
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    return replace(
        found,
        instructions=len(opcodes),
        wide_loads=sum(opcode.startswith("LDG") and ".128" in opcode for opcode in opcodes),
        wide_stores=sum(opcode.startswith("STG") and ".128" in opcode for opcode in opcodes),
        local_accesses=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
    )


def measure(case: Build) -> Resources:
    """Build, and read what was built."""
    compiled = build(case)
    return resources(compiled.asm["cubin"], dynamic_shared=compiled.metadata.shared, sass=case.cc == SASS_CAPABILITY)


def measure_all(cases: list[Build], processes: int = 2) -> dict[str, Resources]:
    """`measure` each, by its key, in `processes` processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip((case.key for case in cases), pool.map(measure, cases, chunksize=4), strict=True))


def _table(found: Mapping[str, Resources]) -> Table:
    table = Table(title=f"Triton {triton.__version__}, built ahead of time", header_style="bold")
    for column in ("build", "registers", "spilled", "shared", "instructions", "128-bit loads", "128-bit stores"):
        table.add_column(column, justify="left" if column == "build" else "right", no_wrap=True)
    for key, row in found.items():
        counts = (row.registers, row.spilled, row.shared, row.instructions, row.wide_loads, row.wide_stores)
        table.add_row(key, *("" if count is None else str(count) for count in counts))
    return table


def main() -> int:
    """Build everything, print the table, check or renew the budgets. 0: all keep theirs; 1: some do not; 2: cannot."""
    parser = argparse.ArgumentParser(prog="python -m smedjan.backends.cuda_triton.aot", description=__doc__)
    parser.add_argument("--update", action="store_true", help="make what was found the budget")
    update = parser.parse_args().update
    try:
        found = measure_all(matrix())
    except BackendError as error:
        print(error, file=sys.stderr)
        return 2
    # Not as narrow as a pipe claims to be: the table is also read in logs.
    console = Console(width=140)
    console.print(_table(found))
    if update:
        budgets.write(triton.__version__, found)
        console.print(f"wrote {len(found)} budgets to {budgets.BUDGETS.name}")
    recorded_release, recorded = budgets.read()
    if recorded_release != triton.__version__:
        console.print(f"budgets are for triton {recorded_release}: only spills on sm_{budgets.NO_SPILL_CC} are checked")
    broken = budgets.breaches(found, recorded, release=triton.__version__, recorded_release=recorded_release)
    for line in broken:
        console.print(line, style="red", highlight=False)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Narrower moments and stochastic rounding: what is kept, and what it costs in accuracy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference.optimizer import dequantize_blocks, quantize_blocks, stochastic_round
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.ops import optimizer as ops
from smedjan.ops.optimizer import BLOCK, ZERO, magnitudes, middles
from smedjan.optim.adamw import AdamW
from smedjan.optim.base import EIGHT_BIT_FROM, STATES
from smedjan.runtime.select import backend

SHAPES = {"w": (32, 160), "odd": (4099,), "norm": (256,), "u": (4096,)}
SEED = 2**40 + 7


def create_dynamic_map(signed: bool) -> torch.Tensor:
    """bitsandbytes 0.50's, for 7 exponent bits of 8."""
    data: list[float] = []
    for i in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        data += (10 ** (i - 6) * means).tolist()
        if signed:
            data += (-(10 ** (i - 6)) * means).tolist()
    return torch.tensor(sorted([*data, 0.0, 1.0]))


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_bitsandbytes(signed):
    """To its own float32 roundings, of which there are three."""
    ours = dequantize_blocks(torch.arange(256, dtype=torch.uint8), torch.ones(1), signed=signed)
    torch.testing.assert_close(ours, create_dynamic_map(signed), rtol=3 * 2.0**-24, atol=0)
    assert bool((ours.diff() > 0).all())
    assert ours[ZERO if signed else 0] == 0
    assert ours[255] == 1


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_and_levels_are_kept(signed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40 * BLOCK, generator=generator) * 10.0 ** (-8 * torch.rand(40 * BLOCK, generator=generator))
    x = x if signed else x.abs()
    codes, absmax = quantize_blocks(x, signed=signed)
    assert codes.dtype == torch.uint8
    assert torch.equal(absmax, x.reshape(-1, BLOCK).abs().amax(-1))
    levels = dequantize_blocks(torch.arange(256, dtype=torch.uint8), torch.ones(1), signed=signed).double()
    scale = absmax.double().repeat_interleave(BLOCK)
    found = (levels[codes.long()] * scale - x.double()).abs()
    levels = levels if signed else levels[1:]  # nothing above zero becomes zero
    best = (levels[:, None] * scale - x.double()).abs().amin(0)
    assert float(((found - best) / scale).max()) <= 4 * 2.0**-24
    again, scales = quantize_blocks(dequantize_blocks(codes, absmax, signed=signed), signed=signed)
    full = absmax == scales  # a block whose largest value is negative has no code for minus one
    assert bool(full.any())
    assert torch.equal(again.reshape(-1, BLOCK)[full], codes.reshape(-1, BLOCK)[full])


def test_blocks_of_zeros_and_of_tiny_values():
    for x in (torch.zeros(BLOCK), torch.full((BLOCK,), 1e-45)):
        codes, absmax = quantize_blocks(x, signed=False)
        assert torch.equal(absmax, x[:1])
        assert bool(dequantize_blocks(codes, absmax, signed=False).isfinite().all())
    assert set(quantize_blocks(torch.zeros(BLOCK), signed=True)[0].tolist()) == {ZERO}
    assert len(middles(signed=False)) == len(magnitudes(signed=False)) - 1 == 255


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_stochastic_rounding_is_to_a_neighbour_and_unbiased():
    """N draws of x between the neighbours low and high: the mean is x, to within 5 standard deviations of
    (high - low) sqrt(p (1 - p) / N). A number of bfloat16, infinity and NaN stay."""
    count = 1 << 16
    for number, value in enumerate((1.001, -1.006, 3e-39, -2.5e38, 0.3)):
        x = torch.full((count,), value)
        drawn = stochastic_round(x, 3, SEED, site=number).double()
        bits = x[:1].view(torch.int32)
        low = (bits & -65536).view(torch.float32).double()
        high = ((bits & -65536) + 65536).view(torch.float32).double()
        assert bool(((drawn == low) | (drawn == high)).all())
        share = float((x[0].double() - low) / (high - low))
        deviation = float((high - low).abs()) * (share * (1 - share) / count) ** 0.5
        assert abs(float(drawn.mean() - x[0].double())) < 5 * deviation
    kept = torch.tensor([1.0, -0.0, 0.5, float("inf"), -float("inf")]).repeat(100)
    assert torch.equal(stochastic_round(kept, 1, SEED, site=0).float(), kept)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).repeat(100)
    assert bool(stochastic_round(nan, 1, SEED, site=0).isnan().all())


def test_random_bits_are_a_function_of_seed_step_site_and_element():
    x = torch.full((1000,), 1.003)
    first = stochastic_round(x, 3, SEED, site=5)
    assert torch.equal(first[:333], stochastic_round(x[:333], 3, SEED, site=5))
    for other in ((4, SEED, 5), (3, SEED + 1, 5), (3, SEED + 2**32, 5), (3, SEED, 6)):
        assert not torch.equal(first, stochastic_round(x, *other[:2], site=other[2]))


def test_a_bfloat16_second_moment_falls_only_by_chance():
    """beta2 = 0.999 moves it by less than half an ulp: to nearest it would stand still for ever."""
    count, steps = 4096, 300
    exact = torch.tensor(1.0, dtype=torch.float64)
    chance = nearest = torch.ones(count, dtype=torch.bfloat16)
    variance = 0.0
    for step in range(steps):
        exact = exact * 0.999
        chance = stochastic_round(chance.float() * 0.999, step, SEED, site=1)
        nearest = (nearest.float() * 0.999).to(torch.bfloat16)
        variance += (2.0**-8) ** 2 / 4  # of one rounding, between neighbours at most 2^-8 apart
    assert bool((nearest == 1).all())
    assert abs(float(chance.double().mean() - exact)) < 5 * (variance / count) ** 0.5


def specs(dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (shape, dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", STATES)
def test_what_is_kept(state, dtype, master):
    kept = AdamW(state_dtype=state, master=master).state(specs(dtype))
    masters = {name for name in kept if name.startswith("master.")}
    assert masters == ({f"master.{name}" for name in SHAPES} if master and dtype == "bfloat16" else set())
    scaled = {name.split(".")[1] for name in kept if "absmax" in name}
    assert scaled == ({"w", "u"} if state == "8bit" else set())
    updated = "float32" if masters else dtype
    for name, shape in SHAPES.items():
        stored = {"same": updated, "8bit": "uint8" if name in scaled else "float32"}.get(state, state)
        assert kept[f"exp_avg.{name}"] == kept[f"exp_avg_sq.{name}"] == (shape, stored)
        if name in scaled:
            blocks = torch.Size(shape).numel() // BLOCK
            assert kept[f"exp_avg_absmax.{name}"] == kept[f"exp_avg_sq_absmax.{name}"] == ((blocks,), "float32")
    assert EIGHT_BIT_FROM == 4096


def train(optimizer: AdamW, on: str, dtype: torch.dtype, *, buckets: bool, steps: int) -> dict[str, torch.Tensor]:
    """Minimises the sum of h (p - t)^2, with h over four decades."""
    kind = str(dtype).removeprefix("torch.")
    where = backend(on)
    graph = optimizer.graph(specs(kind), exact=False, buckets=buckets)
    program = where.program(decompose(graph, where.rules.has))
    generator = torch.Generator().manual_seed(3)
    targets = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    curved = {name: 10.0 ** (-4 * torch.rand(shape, generator=generator)) for name, shape in SHAPES.items()}
    live = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    live |= {name: where.zeros(*spec) for name, spec in optimizer.state(specs(kind)).items()}
    for step in range(steps):
        grads = {f"grad.{n}": (2 * curved[n] * (live[n].float() - targets[n])).to(dtype) for n in SHAPES}
        live = program({**live, **grads, "lr": 1e-2, "step": step + 1, "seed": SEED})
        live.pop("grad_norm")
    losses = [(curved[n] * (live[n].float() - targets[n]).square()).mean() for n in SHAPES]
    return {**live, "loss": torch.stack(losses).sum()}


CHOICES = [
    AdamW(clip=0.5, weight_decay=0.1),
    AdamW(clip=0.0, master=True, state_dtype="bfloat16"),
    AdamW(clip=0.5, rounding="stochastic"),
    AdamW(clip=0.5, rounding="stochastic", state_dtype="8bit"),
    AdamW(clip=0.5, master=True, state_dtype="8bit"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", CHOICES, ids=lambda o: f"{o.state_dtype} {o.rounding} {o.master} {o.clip}")
def test_a_bucket_is_its_parameters_steps(optimizer, dtype):
    """On torch_reference the two graphs have the same bits, and the norm is at most another dtype's."""
    one, other = (train(optimizer, "torch_reference", dtype, buckets=b, steps=3) for b in (False, True))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if dtype == torch.float32 or optimizer.clip == 0:
            assert torch.equal(value, other[name]), name
        else:  # the coefficient is rounded to bfloat16 there
            assert value.dtype == other[name].dtype


@pytest.mark.parametrize("optimizer", CHOICES[1:], ids=lambda o: f"{o.state_dtype} {o.rounding} {o.master} {o.clip}")
def test_training_goes_as_with_float32_state(optimizer):
    """200 steps in bfloat16: the loss falls to within a twentieth of where it falls with a master and float32 state."""
    plain = train(AdamW(master=True), "torch_reference", torch.bfloat16, buckets=True, steps=200)["loss"]
    start = train(AdamW(master=True), "torch_reference", torch.bfloat16, buckets=True, steps=0)["loss"]
    found = train(optimizer, "torch_reference", torch.bfloat16, buckets=True, steps=200)["loss"]
    assert float(plain) < 0.2 * float(start)
    assert abs(float(found - plain)) < 0.05 * float(start)


def on_mlx(name: str, *arrays: torch.Tensor | int, **attrs: Any) -> tuple[torch.Tensor, ...]:
    """The op's lowering there: compiled from a graph of that one node."""
    mlx, oracle = backend("mlx_metal"), backend("torch_reference")
    graph, given = Graph(), {}
    for at, array in enumerate(arrays):
        tensor = isinstance(array, torch.Tensor)
        raw = oracle.to_raw(array) if tensor else None
        graph.input(str(at), raw.shape if raw else (), raw.dtype if raw else "int64")
        given[str(at)] = mlx.from_raw(raw) if raw else array
    made = getattr(ops, name)(*graph.inputs.values(), **attrs)
    made = made if isinstance(made, tuple) else (made,)
    for at, tensor in enumerate(made):
        graph.output(str(at), tensor)
    found = mlx.program(graph)(given)
    return tuple(oracle.from_raw(mlx.to_raw(found[str(at)])) for at in range(len(made)))


def bits(array: torch.Tensor) -> torch.Tensor:
    return array.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("signed", [True, False])
def test_mlx_has_the_same_codes_to_the_bit(signed):
    """Values over eight decades, each level, each middle and its neighbours, zeros and the smallest numbers."""
    generator = torch.Generator().manual_seed(1)
    edges = torch.tensor([*magnitudes(signed=signed), *middles(signed=signed)])
    edges = torch.cat([edges, edges.nextafter(torch.zeros(1)), edges.nextafter(torch.ones(1))])
    edges = torch.nn.functional.pad(edges, (0, -len(edges) % (BLOCK - 1))).reshape(-1, BLOCK - 1)
    edges = torch.nn.functional.pad(edges, (0, 1), value=1.0).reshape(-1)  # each block's largest is 1
    drawn = torch.randn(40 * BLOCK, generator=generator) * 10.0 ** (-8 * torch.rand(40 * BLOCK, generator=generator))
    x = torch.cat([drawn, edges, -edges, torch.zeros(BLOCK), torch.full((BLOCK,), 1e-38)])
    x = (x if signed else x.abs()).reshape(-1, 2 * BLOCK // 4)
    for made, expected in zip(
        on_mlx("quantize_blocks", x, signed=signed), quantize_blocks(x, signed=signed), strict=True
    ):
        assert torch.equal(bits(made), bits(expected))
    codes, absmax = torch.arange(256, dtype=torch.uint8).repeat(3), torch.tensor([1.0, 3e-7, 2e30])
    [found] = on_mlx("dequantize_blocks", codes, absmax, signed=signed)
    assert torch.equal(bits(found), bits(dequantize_blocks(codes, absmax, signed=signed)))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 11), (4096,)])
@pytest.mark.parametrize("seed", [0, 2**31, SEED, 2**63 - 1])
def test_mlx_rounds_to_the_same_bits(shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    [found] = on_mlx("stochastic_round", x, 3, seed, site=5)
    assert torch.equal(found, stochastic_round(x, 3, seed, site=5))
    special = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000, 0x7F7FFFFF, 0], dtype=torch.int32)
    special = special.view(torch.float32)
    [found] = on_mlx("stochastic_round", special, 3, seed, site=5)
    assert torch.equal(bits(found), bits(stochastic_round(special, 3, seed, site=5)))


def test_buckets_hold_what_is_alike():
    """One bucket for the codes and one for what is too small or odd for them; sites are of all parameters."""
    graph = AdamW(state_dtype="8bit", master=True).graph(specs("bfloat16"), exact=False, buckets=True)
    buckets = [node for node in graph.nodes if node.op.name == "adamw_bucket"]
    assert [(node.attrs["sites"], node.attrs["eight_bit"]) for node in buckets] == [((0, 3), True), ((1, 2), False)]
    ops = [node.op.name for node in graph.nodes if node.op.name != "input"]
    assert ops == ["norm_and_clip", "adamw_bucket", "adamw_bucket"]
    Program(decompose(graph, ATEN.has), ATEN)  # what is donated is read by nobody later
    assert replace(CHOICES[0], clip=0.0).graph(specs("float32"), exact=False, buckets=True).outputs["grad_norm"]

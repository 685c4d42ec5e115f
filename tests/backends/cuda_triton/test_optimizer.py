"""AdamW over buckets on Triton against float64, torch.optim.AdamW and torch_reference."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from smedjan.backends.cuda_triton import optimizer
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import optimizer as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned import memory
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launches
from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference.optimizer import dequantize_blocks, quantize_blocks, stochastic_round
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.ops.optimizer import BLOCK, magnitudes, middles
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.tolerances import assert_close

SETTINGS = [(1e-2, 0.9, 0.999, 1e-8, 0.01), (1e-1, 0.8, 0.95, 1e-6, 0.0), (1e-2, 0.3, 0.5, 1e-8, 0.1)]
"""lr, beta1, beta2, eps, weight_decay; the last takes the other branch of lerp (1 - beta1 >= 0.5)."""

SEED = 0x1234_5678_9ABC_DEF0


def names(setting: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(("beta1", "beta2", "eps", "weight_decay"), setting[1:], strict=True))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bucket: sizes of its parameters, dtypes of what is updated, of the gradients and of the moments ("8bit")."""

    sizes: tuple[int, ...]
    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    moments: torch.dtype | str = torch.float32
    narrow: bool = False
    stochastic: tuple[bool, bool] = (False, False)
    scale: float | None = None
    setting: tuple[float, ...] = SETTINGS[0]
    step: int = 3

    def __str__(self) -> str:
        kinds = [str(kind).removeprefix("torch.") for kind in (self.param, self.grad, self.moments)]
        chance = "".join("pv"[n] for n in (0, 1) if self.stochastic[n])
        extra = [*(["narrow"] if self.narrow else []), *([chance] if chance else []), *(["clip"] if self.scale else [])]
        return " ".join([*kinds, *extra, "x".join(map(str, self.sizes))])

    @property
    def eight_bit(self) -> bool:
        return self.moments == "8bit"

    @property
    def attrs(self) -> dict[str, Any]:
        return {
            **names(self.setting),
            "sites": tuple(range(3, 3 + len(self.sizes))),
            "eight_bit": self.eight_bit,
            "narrow": str(self.grad).removeprefix("torch.") if self.narrow else "",
            "stochastic": self.stochastic,
        }


@dataclass(kw_only=True)
class Arrays:
    """A bucket's arrays, a list of each kind."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    absmaxes: tuple[list[Tensor], list[Tensor]] = ([], [])
    narrows: list[Tensor] = field(default_factory=list)

    def inputs(self) -> list[Tensor]:
        lists = [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, *self.absmaxes, self.narrows]
        return [tensor.clone() for each in lists for tensor in each]


def draw(case: Case, rand: Any) -> Arrays:
    """A run under way. Second moments are squares of what the first are means of, or the step would be no step."""
    params = [rand(size, dtype=case.param) for size in case.sizes]
    grads = [rand(size, dtype=case.grad) for size in case.sizes]
    firsts = [rand(size, scale=0.3) for size in case.sizes]
    seconds = [rand(size).square() * 0.1 + first.square() for size, first in zip(case.sizes, firsts, strict=True)]
    made = Arrays(params=params, grads=grads, exp_avgs=firsts, exp_avg_sqs=seconds)
    if case.eight_bit:
        codes = [[quantize_blocks(x, signed=s) for x in each] for each, s in ((firsts, True), (seconds, False))]
        made.exp_avgs, made.exp_avg_sqs = ([code for code, _ in each] for each in codes)
        first, second = ([absmax for _, absmax in each] for each in codes)
        made.absmaxes = (first, second)
    else:
        made.exp_avgs, made.exp_avg_sqs = ([x.to(case.moments) for x in each] for each in (firsts, seconds))
    if case.narrow:
        made.narrows = [torch.zeros_like(grad) for grad in grads]
    return made


def scalars(case: Case, device: Any) -> list[Any]:
    scale = None if case.scale is None else torch.tensor(case.scale, device=device)
    return [case.setting[0], case.step, SEED if any(case.stochastic) else None, scale, torch.ones((), device=device)]


def ours(case: Case, arrays: Arrays) -> list[Tensor]:
    return list(apply("adamw_bucket", *arrays.inputs(), *scalars(case, arrays.params[0].device), **case.attrs))


def plain(case: Case, arrays: Arrays) -> list[Tensor]:
    """The decomposition, on torch_reference."""
    given = [*arrays.inputs(), *scalars(case, arrays.params[0].device)]
    node = node_of("adamw_bucket", given, case.attrs)
    for index, tensor in enumerate(node.outputs):
        node.graph.output(f"{index}", tensor)
    graph = decompose(node.graph, ATEN.has)
    assert "adamw_bucket" not in {each.op.name for each in graph.nodes}
    bound = {f"{index}": value for index, value in enumerate(given) if value is not None}
    return list(Program(graph, ATEN)(bound).values())


def wide(case: Case, arrays: Arrays, index: int, stored: list[Tensor] | None = None) -> list[Tensor]:
    """Both moments of a parameter in float64, of `arrays` or of a bucket's results."""
    count = len(case.sizes)
    if stored is None:
        moments = [arrays.exp_avgs[index], arrays.exp_avg_sqs[index]]
        absmaxes = [each[index] for each in arrays.absmaxes if each]
    else:
        moments, absmaxes = stored[count + index : 3 * count : count], stored[3 * count + index : 5 * count : count]
    if not case.eight_bit:
        return [moment.double() for moment in moments]
    return [
        dequantize_blocks(moment, torch.ones_like(absmax), signed=signed).double()
        * absmax.double().repeat_interleave(BLOCK)
        for moment, absmax, signed in zip(moments, absmaxes, (True, False), strict=True)
    ]


def formula(case: Case, arrays: Arrays, index: int) -> list[Tensor]:
    """torch.optim.AdamW's step in float64: param, exp_avg, exp_avg_sq."""
    lr, beta1, beta2, eps, decay = case.setting
    p, g = arrays.params[index].double(), arrays.grads[index].double() * (case.scale or 1.0)
    m, v = wide(case, arrays, index)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    root = (v / (1 - beta2**case.step)).sqrt() + eps
    return [p * (1 - lr * decay) - lr / (1 - beta1**case.step) * m / root, m, v]


def check(case: Case, arrays: Arrays) -> None:
    """Every result of every parameter within the derived bound."""
    got, torchs = ours(case, arrays), plain(case, arrays)
    count = len(case.sizes)
    assert len(got) == len(torchs) == count * (3 + 2 * case.eight_bit + case.narrow)
    for index in range(count):
        p, m, v = formula(case, arrays, index)
        assert_close(f"param {index}", got[index], p, torchs[index])
        ours_wide, plain_wide = wide(case, arrays, index, got), wide(case, arrays, index, torchs)
        for kind, (name, true) in enumerate((("exp_avg", m), ("exp_avg_sq", v))):
            stored = got[(1 + kind) * count + index]
            if not case.eight_bit:
                assert_close(f"{name} {index}", stored, true, torchs[(1 + kind) * count + index])
                continue
            largest = true.reshape(-1, BLOCK).abs().amax(-1)
            places = (3 + kind) * count + index
            assert_close(f"{name} absmax {index}", got[places], largest, torchs[places])
            # Torch's codes, or where float32 lands on the other side of a middle the next one: as near to it.
            assert_nearest(ours_wide[kind], true, largest, signed=kind == 0)
            assert_nearest(plain_wide[kind], true, largest, signed=kind == 0)
            other = torchs[(1 + kind) * count + index]
            assert int((stored.int() - other.int()).abs().max()) <= 1
            assert float((stored != other).float().mean()) <= 0.01
        if case.narrow:
            assert torch.equal(got[-count + index], got[index].to(case.grad))


def assert_nearest(found: Tensor, true: Tensor, largest: Tensor, *, signed: bool) -> None:
    """No level is nearer than the one found, but for float32's roundings: 16 u of the block's largest value."""
    levels = torch.tensor(magnitudes(signed=signed), device=true.device).double()
    levels = torch.cat((-levels[:-1], levels)).unique() if signed else levels[1:]
    scale = largest.repeat_interleave(BLOCK)
    best = (levels[:, None] * scale - true).abs().amin(0)
    off = (found - true).abs() - best
    assert float((off / scale).max()) <= 16 * 2.0**-24


def generated() -> list[Case]:
    """48 buckets: of one parameter, of odd sizes, of empty ones, larger than a tile; every kind of state."""
    chance = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {},
        {"grad": torch.bfloat16, "narrow": True},
        {"grad": torch.float16, "narrow": True},
        {"param": torch.bfloat16, "grad": torch.bfloat16, "moments": torch.bfloat16},
        {"param": torch.bfloat16, "grad": torch.bfloat16, "stochastic": (True, False)},
        {"param": torch.bfloat16, "grad": torch.bfloat16, "moments": torch.bfloat16, "stochastic": (True, True)},
        {"grad": torch.bfloat16, "moments": torch.bfloat16, "narrow": True, "stochastic": (False, True)},
        {"moments": torch.bfloat16, "stochastic": (False, True)},
        {"moments": "8bit"},
        {"grad": torch.bfloat16, "moments": "8bit", "narrow": True},
        {"param": torch.bfloat16, "grad": torch.bfloat16, "moments": "8bit", "stochastic": (True, False)},
        {"param": torch.bfloat16, "grad": torch.bfloat16, "moments": "8bit"},
    ]
    sizes = [(1,), (7, 0, 33), (1024, 1, 1025), (3,) * 9]
    cases = []
    for number in range(48):
        kind = kinds[number % len(kinds)]
        unit = BLOCK if kind.get("moments") == "8bit" else 1
        mix = sizes[number // len(kinds) % 4]
        if number >= 12:
            mix = tuple(chance.choice((1, 3, 5, 8, 9, 17)) * chance.choice((1, 8, 31)) for _ in range(len(mix)))
        if unit > 1:
            mix = tuple(unit * (1 + size % 6) for size in mix)
        cases.append(
            Case(
                sizes=mix,
                scale=chance.choice((None, 0.25, 0.81)),
                setting=chance.choice(SETTINGS),
                step=chance.choice((1, 2, 1000)),
                **kind,
            )
        )
    return cases


@pytest.mark.parametrize("case", generated(), ids=str)
def test_a_bucket_is_within_the_derived_bound(rand, case):
    check(case, draw(case, rand))


def reference(param: Tensor, grads: list[Tensor], setting: tuple[float, ...]) -> list[Tensor]:
    """param, exp_avg, exp_avg_sq after torch.optim.AdamW's single-tensor steps, in param's dtype."""
    lr, beta1, beta2, eps, decay = setting
    leaf = param.clone().requires_grad_()
    torchs = torch.optim.AdamW(
        [leaf], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, foreach=False, fused=False
    )
    for grad in grads:
        leaf.grad = grad.to(param.dtype)
        torchs.step()
    state = torchs.state[leaf]
    return [leaf.detach(), state["exp_avg"], state["exp_avg_sq"]]


def steps(param: Tensor, grads: list[Tensor], setting: tuple[float, ...], *, scale: Tensor | None = None) -> Any:
    """`adamw_update` with float32 moments, once for each gradient."""
    made = (param.clone(), *(torch.zeros(param.shape, device=param.device) for _ in range(2)))
    for step, grad in enumerate(grads, 1):
        new = apply("adamw_update", made[0], grad, *made[1:], setting[0], step, scale, **names(setting))
        assert all(one is other for one, other in zip(new, made, strict=True)), "not in place"
    return made


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 3), (576, 5)], ids=str)
def test_ten_steps_are_within_the_derived_bound(rand, shape, setting):
    param, grads = rand(*shape), [rand(*shape, scale=10.0 ** (step % 3 - 1)) for step in range(10)]
    true = reference(param.double(), grads, setting)
    torchs = reference(param, grads, setting)
    kinds = ("param", "exp_avg", "exp_avg_sq")
    for name, value, exact, torch32 in zip(kinds, steps(param, grads, setting), true, torchs, strict=True):
        assert_close(name, value, exact, torch32)


def test_grad_scale_multiplies_the_gradient_and_leaves_it(rand, device, same):
    param, grads = rand(33), [rand(33) for _ in range(3)]
    before = [grad.clone() for grad in grads]
    scaled = steps(param, grads, SETTINGS[0], scale=torch.tensor(0.25, device=device))
    assert all(torch.equal(*pair) for pair in zip(grads, before, strict=True))
    for value, exact in zip(scaled, steps(param, [grad * 0.25 for grad in grads], SETTINGS[0]), strict=True):
        same(value, exact)


def test_without_a_master_a_bfloat16_param_is_the_rounding_of_one_step(rand, same):
    param, grad = rand(1100, dtype=torch.bfloat16), rand(1100)
    (exact, *_), (rounded, *_) = steps(param.float(), [grad], SETTINGS[0]), steps(param, [grad], SETTINGS[0])
    same(rounded, exact.to(torch.bfloat16))


def test_nothing_to_update(rand):
    assert steps(rand(0), [rand(0)], SETTINGS[0])[0].shape == (0,)


CHANCE = [
    Case(sizes=(5, 1100, 8, 2049), param=torch.bfloat16, moments=torch.bfloat16, stochastic=(True, True)),
    Case(sizes=(256, 2048), param=torch.bfloat16, moments="8bit", stochastic=(True, False)),
]


@pytest.mark.parametrize("case", CHANCE, ids=str)
def test_random_bits_are_torchs(rand, case):
    """What is rounded by chance is torch_reference's rounding of what the kernel gives in float32."""
    arrays = draw(case, rand)
    exact = replace(case, param=torch.float32, moments="8bit" if case.eight_bit else torch.float32)
    unrounded = replace(exact, stochastic=(False, False))
    widened = replace(arrays, params=[p.float() for p in arrays.params])
    if not case.eight_bit:
        widened.exp_avgs, widened.exp_avg_sqs = (
            [x.float() for x in each] for each in (arrays.exp_avgs, arrays.exp_avg_sqs)
        )
    got, float32 = ours(case, arrays), ours(unrounded, widened)
    count = len(case.sizes)
    for index, site in enumerate(case.attrs["sites"]):
        assert torch.equal(got[index], stochastic_round(float32[index], case.step, SEED, site=2 * site))
        if case.stochastic[1]:
            place = 2 * count + index
            assert torch.equal(got[place], stochastic_round(float32[place], case.step, SEED, site=2 * site + 1))
    again = ours(replace(case, step=case.step + 1), arrays)
    assert not torch.equal(got[-1], again[-1]) or case.eight_bit


def test_a_bucket_in_another_order_has_the_same_bits(rand, device):
    """Parameters that lie behind another already (stacked weights) stay so: random bits follow the parameter."""
    case = CHANCE[0]
    arrays = draw(case, rand)
    given = arrays.inputs()
    flat = memory.stacked([given[2], given[0]], lambda *a: torch.empty(a[0], dtype=a[1], device=a[2]))
    made = apply("adamw_bucket", *given, *scalars(case, device), **case.attrs)
    assert memory.follow(given[2], given[0])
    assert flat.numel() == 13
    for value, other in zip(made, ours(case, arrays), strict=True):
        assert torch.equal(value, other)


def test_rounding_by_chance_keeps_small_steps_in_the_mean(device):
    """A decay of 2^-10 is below half of bfloat16's distance of 2^-8 below 1: to nearest, nothing moves. By chance a
    quarter of the values move, to within 5 standard deviations, sqrt(p (1 - p) / N) each."""
    count, lr, decay = 20000, 2.0**-5, 2.0**-5
    case = Case(
        sizes=(count,), param=torch.bfloat16, stochastic=(True, False), setting=(lr, 0.9, 0.999, 1e-8, decay), step=1
    )
    one, zero = torch.ones(count, dtype=torch.bfloat16, device=device), torch.zeros(count, device=device)
    arrays = Arrays(params=[one], grads=[zero], exp_avgs=[zero], exp_avg_sqs=[zero])
    moved = ours(case, arrays)[0]
    ulp = 2.0**-8
    share = lr * decay / ulp
    assert set(moved.unique().tolist()) == {1.0, 1.0 - ulp}
    found = float((moved < 1).double().mean())
    assert abs(found - share) < 5 * (share * (1 - share) / count) ** 0.5
    assert torch.equal(ours(replace(case, stochastic=(False, False)), arrays)[0], one)


@triton.jit
def _all_levels(x, middles, y, PARTS: tl.constexpr, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(y + col, kernels._level(tl.load(x + col), middles, PARTS))


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_the_nearest_ones(device, signed):
    """Every middle, the float32 below and above it, every magnitude, powers of ten, subnormals, and random shares."""
    between = torch.tensor(middles(signed=signed))
    levels = torch.tensor(magnitudes(signed=signed))
    generator = torch.Generator().manual_seed(3)
    tens = 10.0 ** torch.arange(-9, 1).float()
    edges = torch.cat((between, levels, tens, torch.tensor([0.0, 1e-45, 1e-39, 0.99999994])))
    around = [edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(2.0))]
    spread = 10.0 ** -(torch.rand(5000, generator=generator) * 9)
    share = torch.cat((*around, spread, torch.rand(1000, generator=generator))).clamp(max=1.0)
    cols = common.next_power_of_2(len(share))
    share = torch.nn.functional.pad(share, (0, cols - len(share)))
    found = torch.zeros(cols, dtype=torch.int32, device=device)
    _all_levels[(1,)](share.to(device), between.to(device), found, PARTS=1 if signed else 2, COLS=cols)
    assert torch.equal(found.cpu().long(), torch.searchsorted(between, share))


def test_a_second_moment_above_zero_does_not_become_zero(device):
    """0 under a first moment that is not zero would make the next step m / eps."""
    x = torch.zeros(BLOCK, device=device)
    x[0], x[1] = 1.0, 1e-12
    zero = torch.zeros(BLOCK, device=device)
    start = Arrays(
        params=[zero],
        grads=[zero],
        exp_avgs=[torch.full((BLOCK,), 127, dtype=torch.uint8, device=device)],
        exp_avg_sqs=[quantize_blocks(x, signed=False)[0]],
        absmaxes=([torch.zeros(1, device=device)], [torch.ones(1, device=device)]),
    )
    assert start.exp_avg_sqs[0][:3].tolist() == [255, 1, 0]
    made = ours(Case(sizes=(BLOCK,), moments="8bit"), start)
    assert made[2][:3].tolist() == [255, 1, 0]
    assert bool((made[1] == 127).all()), "a block of zeros"


def launches(op_name: str, ins: list[Any], **attrs: Any) -> list[str]:
    """Names of what is started, from arrays without memory."""
    node = node_of(op_name, ins, attrs)

    def empty(shape: Any, dtype: torch.dtype, device: Any = "meta") -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def host(function: Any, scalars: Any) -> Tensor:
        return empty((len(function(*scalars)),), torch.float32)

    run = Launches(torch.device("meta"), scratch=empty, host=host, allocate=empty)
    outs = tuple(torch.empty(t.shape, device="meta") for t in node.outputs)
    RULES.lower(node).bind(run, tuple(ins), outs, **node.attrs)
    return [call.name for call in run.calls]


@pytest.mark.parametrize("case", generated()[:12], ids=str)
def test_an_update_is_three_launches(case, rand):
    arrays = draw(case, rand)
    given = [*(tensor.to("meta") for tensor in arrays.inputs()), *scalars(case, "meta")]
    assert launches("adamw_bucket", given, **case.attrs) == ["adamw"]
    grads = [grad.to("meta") for grad in arrays.grads]
    assert launches("norm_and_clip", grads, max_norm=1.0) == ["square_sum", "root_of_sum"]


DECAY = "    p = p * tl.load(numbers + DECAY)\n"
STEP = "    p = p - tl.load(numbers + STEP_SIZE) * tl.div_rn(m, denominator)\n"
MUTATIONS = {
    "decay after the step": {DECAY: "", STEP: STEP + DECAY},
    "grad_scale dropped": {"g = g * tl.load(grad_scale)": "g = g + 0.0"},
    "last block skipped": {"inside = local + offset < numel": "inside = local + offset < numel // BLOCK * BLOCK"},
    "eps inside the root": {"tl.sqrt_rn(v)": "tl.sqrt_rn(v + eps)"},
    "no correction of the second moment": {", tl.load(numbers + ROOT_CORRECTION2)) + eps": ", 1.0) + eps"},
    "lerp from the gradient": {"m = m + one_minus_beta1 * (g - m)": "m = g + one_minus_beta1 * (m - g)"},
    "gradient not squared": {"one_minus_beta2 * g * g": "one_minus_beta2 * tl.abs(g)"},
}
EIGHT_BIT_MUTATIONS = {
    "sign of the codes dropped": {"m = tl.where(code < ZERO, -m, m)": "m = m"},
    "scale of the first block": {"block = start // BLOCK + tl": "block = start // BLOCK + 0 * tl"},
    "one level too low": {"return level + up.to(tl.int32) -": "return level - 1 + up.to(tl.int32) -"},
    "old scale kept": {"tl.store(exp_avg_absmax + block, absmax, mask=within)": "pass"},
    "neighbours not asked": {"return level + up.to(tl.int32) - down.to(tl.int32)": "return level"},
}


DECAYED = (0.1, 0.9, 0.99, 1e-3, 0.1)


@pytest.mark.parametrize("name", [*MUTATIONS, *EIGHT_BIT_MUTATIONS])
def test_a_mutation_is_out_of_bound(rand, monkeypatch, tmp_path, name):
    case = Case(sizes=(300, 40), scale=0.25, setting=DECAYED)
    if name in EIGHT_BIT_MUTATIONS:
        case = replace(case, sizes=(2 * BLOCK, BLOCK), moments="8bit")
    arrays = draw(case, rand)
    check(case, arrays)
    wrong = mutated(kernels, (MUTATIONS | EIGHT_BIT_MUTATIONS)[name], tmp_path)
    monkeypatch.setattr(optimizer, "kernels", wrong)
    assert fails(lambda: check(case, arrays))


def test_a_missing_bias_correction_is_out_of_bound(rand, monkeypatch):
    case = Case(sizes=(300, 40), setting=DECAYED)
    arrays = draw(case, rand)
    check(case, arrays)
    folded = optimizer.numbers

    def uncorrected(lr, *args, **attrs):
        decay, _, *rest = folded(lr, *args, **attrs)
        return [decay, lr, *rest]

    monkeypatch.setattr(optimizer, "numbers", uncorrected)
    assert fails(lambda: check(case, arrays))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("words & 0xFFFF, words >> 16", "words >> 16, words & 0xFFFF"),
        ("seed, group, zero + site,", "seed, group, zero,"),
        ("tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
        ("_chance(numbers, local, 2 * site, ROWS)", "_chance(numbers, start, 2 * site, ROWS)"),
    ],
)
def test_other_random_bits_are_told_apart(rand, monkeypatch, tmp_path, old, new):
    monkeypatch.setattr(optimizer, "kernels", mutated(kernels, {old: new}, tmp_path))
    assert fails(lambda: test_random_bits_are_torchs(rand, CHANCE[0]))

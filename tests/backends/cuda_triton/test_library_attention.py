"""cuDNN's and torch's attention in the rule table: chosen by data alone, for what they can do, forward with backward.

They need a GPU. What is held here is which rule runs what, which arrays it is given, that torch's ops take what they
are called with (their meta kernels check it), and that what they give goes where it belongs.
"""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import library_attention, tuned
from smedjan.backends.cuda_triton.apply import prepare
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned import immediate
from smedjan.backends.planned.immediate import node_of
from tests.backends.cuda_triton.test_plan import programs

NAMES = {"cudnn": "cudnn attention", "flash": "aten attention flash"}
PLAIN: dict[str, Any] = {"scale": 0.125, "causal": True, "window": 0, "cap": 0.0}
BF16 = torch.bfloat16


def everywhere(library: str) -> dict[int, Any]:
    """The table of launch shapes with this choice in every class."""
    return {
        number: {**kernels, "attention_choice": {key: {"library": library} for key in kernels["attention_choice"]}}
        for number, kernels in tuned.table().items()
    }


@pytest.fixture
def choose(monkeypatch):
    """choose("cudnn"): a table that says so everywhere, and a plan for sm_90."""

    def choice(library: str) -> None:
        table = everywhere(library)
        monkeypatch.setattr(tuned, "table", lambda: table)

    with tuned.architecture(90):
        yield choice


def arrays(dim: int = 64, tokens: int = 16, dtype: torch.dtype = BF16, keys: int = 0, device: str = "meta") -> Any:
    """q of 4 heads, k and v of 2, as a stacked projection leaves them: parts of one array, heads moved to the front."""
    count = keys or tokens
    stacked = torch.zeros(2, count, 8, dim, dtype=dtype, device=device).transpose(1, 2)
    q, k, v = stacked[:, :4, :tokens], stacked[:, 4:6], stacked[:, 6:]
    y = torch.zeros(2, tokens, 4, dim, dtype=dtype, device=device).transpose(1, 2)
    return SimpleNamespace(q=q, k=k, v=v, y=y, dy=y, lse=torch.zeros(2, 4, tokens, device=device))


def labels(given: Any, masks: tuple[Tensor | None, ...] = (None,) * 4, **attrs: Any) -> tuple[str, str]:
    attrs = {**PLAIN, **attrs}
    forward = node_of("flash_attention", (given.q, given.k, given.v, *masks), attrs)
    ins = (given.dy, given.q, given.k, given.v, *masks, given.y, given.lse)
    backward = node_of("flash_attention_bwd", ins, {**attrs, "needs_sinks": masks[3] is not None})
    return RULES.lower(forward).label, RULES.lower(backward).label


TRITON = ("triton attention", "triton attention_bwd, deterministic")


def test_nothing_is_chosen_that_was_not_measured():
    """Issue 5: "where they are the best there is". No GPU has run them beside Triton's kernels yet."""
    for number, kernels in tuned.table().items():
        chosen = kernels["attention_choice"]
        assert {entry["library"] for entry in chosen.values()} == {"triton"}, number
        assert chosen.keys() == {f"causal {name}" for name in kernels["attention_fwd"] if not name.endswith("f32")}
    assert labels(arrays()) == TRITON


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128])
def test_the_table_chooses_forward_and_backward(choose, library, dtype, dim):
    choose(library)
    assert labels(arrays(dim, dtype=dtype)) == (NAMES[library], f"{NAMES[library]} backward")


def test_a_class_and_an_architecture_are_chosen_alone(monkeypatch):
    table = {int(number): kernels for number, kernels in json.loads(json.dumps(tuned.table())).items()}
    table[90]["attention_choice"]["causal 128 bf16"] = {"library": "cudnn"}
    monkeypatch.setattr(tuned, "table", lambda: table)
    for capability, dim, dtype, chosen in (
        (90, 128, BF16, True),
        (90, 112, BF16, True),
        (90, 64, BF16, False),
        (90, 128, torch.float16, False),
        (80, 128, BF16, False),
        (100, 128, BF16, False),
    ):
        with tuned.architecture(capability):
            assert (labels(arrays(dim, dtype=dtype))[0] == "cudnn attention") is chosen


def test_the_interpreter_runs_tritons(monkeypatch):
    """It has no GPU to run another's on, whatever is best on the architecture whose launch shapes it takes."""
    table = everywhere("cudnn")
    monkeypatch.setattr(tuned, "table", lambda: table)
    for interpreted, chosen in ((True, TRITON), (False, ("cudnn attention", "cudnn attention backward"))):
        monkeypatch.setattr(tuned.common, "INTERPRETED", SimpleNamespace(value=interpreted))
        assert labels(arrays()) == chosen


@pytest.mark.parametrize("library", NAMES)
def test_what_they_cannot_do_is_tritons(choose, library):
    """A rule of the table like any other, which the plan names: no fallback when something fails."""
    choose(library)
    mask = torch.zeros(2, 16, dtype=torch.bool, device="meta")
    bounds = torch.zeros(2, 16, dtype=torch.int32, device="meta")
    sinks = torch.zeros(4, dtype=BF16, device="meta")
    for masks in ((mask, None, None, None), (None, bounds, bounds, None), (None, None, None, sinks)):
        assert labels(arrays(), masks) == TRITON
    for attrs in ({"window": 8}, {"cap": 30.0}, {"causal": False}):
        assert labels(arrays(), **attrs) == TRITON
    for given in (arrays(dtype=torch.float32), arrays(dim=60), arrays(tokens=1), arrays(tokens=8, keys=16)):
        assert labels(given) == TRITON
    wide = {"cudnn": (136, 256), "flash": (200, 224)}
    for dim in wide[library]:
        assert labels(arrays(dim)) == TRITON
    assert (labels(arrays(256)) == TRITON) == (library == "cudnn")


@pytest.mark.parametrize("library", NAMES)
def test_what_is_written_down(choose, library, monkeypatch):
    """One call each, over the arrays as they are; torch's own checks of them pass."""
    choose(library)
    # Without memory there is nothing to guard.
    monkeypatch.setattr(immediate, "allocate", lambda shape, dtype, on: torch.empty(shape, dtype=dtype, device=on))
    given = arrays()
    [call], (y, lse) = prepare("flash_attention", given.q, given.k, given.v, None, None, None, None, **PLAIN)
    assert (call.name, call.grid, dict(call.constants)) == (NAMES[library], (), {"scale": 0.125})
    assert all(one is other for one, other in zip(call.args, (given.q, given.k, given.v, y, lse), strict=True))
    call()
    ins = (given.dy, given.q, given.k, given.v, None, None, None, None, given.y, given.lse)
    [call], outs = prepare("flash_attention_bwd", *ins, needs_sinks=False, **PLAIN)
    assert (call.name, call.grid, dict(call.constants)) == (f"{NAMES[library]} backward", (), {"scale": 0.125})
    expected = (given.dy, given.q, given.k, given.v, given.y, given.lse, *outs)
    assert all(one is other for one, other in zip(call.args, expected, strict=True))
    assert [out.shape for out in outs] == [given.q.shape, given.k.shape, given.v.shape]
    call()


def test_torchs_ops_are_what_the_rules_take_them_for():
    """cuDNN's lse is [B, A, T, 1] (from torch 2.9 on), flash's [B, A, T]; both groups' heads as they are."""
    given = arrays()
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention(given.q, given.k, given.v, None, True, 0.0, True)
    flash = torch.ops.aten._scaled_dot_product_flash_attention(given.q, given.k, given.v, 0.0, True)
    assert (cudnn[1].shape, flash[1].shape) == ((2, 4, 16, 1), (2, 4, 16))
    assert cudnn[0].shape == flash[0].shape == given.q.shape


def stand_in(monkeypatch, name: str, function: Any) -> list[Any]:
    """`torch.ops.aten.NAME` as `function`; gives the keywords of its calls."""
    seen: list[Any] = []

    def call(*args: Any, **keywords: Any) -> Any:
        seen.append((args, keywords))
        return function(*args)

    ops = SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace(**{name: call})))
    changed = {key: getattr(torch, key) for key in ("empty_like", "uint64", "int64", "Tensor")}
    monkeypatch.setattr(library_attention, "torch", SimpleNamespace(**changed, **vars(ops)))
    return seen


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("wanted", [True, False], ids=["lse", "no lse"])
def test_what_they_give_is_copied(monkeypatch, library, wanted):
    """y into a wider array; lse where it is read, which cuDNN then is asked for."""
    given = arrays(device="cpu")
    lse = torch.randn(2, 4, 16, 1) if library == "cudnn" else torch.randn(2, 4, 16)
    y = torch.randn(given.q.shape).to(BF16)
    seen = stand_in(monkeypatch, f"_scaled_dot_product_{library}_attention", lambda *_: (y, lse))
    wider = torch.full((2, 4, 16, 100), 7.0, dtype=BF16)
    out, out_lse = wider[..., 20:84], torch.full((2, 4, 16), 7.0) if wanted else None
    forward = getattr(library_attention, f"{library}_forward")
    forward(given.q, given.k, given.v, out, out_lse, scale=0.25)
    assert torch.equal(out, y)
    assert bool((wider[..., :20] == 7).all())
    assert bool((wider[..., 84:] == 7).all())
    assert out_lse is None or torch.equal(out_lse, lse.view(2, 4, 16))
    [(_, keywords)] = seen
    assert keywords["is_causal"] is True
    assert (keywords["dropout_p"], keywords["scale"]) == (0.0, 0.25)
    assert keywords.get("compute_log_sumexp", wanted) is wanted


@pytest.mark.parametrize("library", NAMES)
def test_the_gradients_that_are_read_are_copied(monkeypatch, library):
    given = arrays(device="cpu")
    made = tuple(torch.randn(t.shape).to(BF16) for t in (given.q, given.k, given.v))
    seen = stand_in(monkeypatch, f"_scaled_dot_product_{library}_attention_backward", lambda *_: made)
    dk = torch.zeros(given.k.shape, dtype=BF16)
    # y and dy in plain order, q with its heads inside: cuDNN must see them as its forward made y.
    y, dy = torch.randn(2, 2, 4, 16, 64).to(BF16)
    backward = getattr(library_attention, f"{library}_backward")
    backward(dy, given.q, given.k, given.v, y, given.lse, None, dk, None, scale=0.25)
    assert torch.equal(dk, made[1])
    [(args, keywords)] = seen
    assert torch.equal(args[0], dy)
    assert torch.equal(args[4], y)
    assert args[5].shape == ((2, 4, 16, 1) if library == "cudnn" else (2, 4, 16))
    if library == "cudnn":
        assert args[0].stride() == args[4].stride() == torch.empty_like(given.q).stride() != y.stride()
    assert (keywords["max_q"], keywords["max_k"], keywords["is_causal"]) == (16, 16, True)


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("packing", [False, True], ids=["causal", "packed"])
def test_a_planned_step_says_which_ran(choose, library, packing):
    choose(library)
    micro, _ = programs("llama", "plain", "full", packing=packing)
    rows = Counter({row["lowering"]: row["count"] for row in micro.lowerings() if "flash_attention" in row["op"]})
    launches = micro.launches()
    if packing:
        assert set(rows) == set(TRITON)
        assert launches[NAMES[library]] == 0
    else:
        layers = rows[NAMES[library]]
        assert rows == {NAMES[library]: layers, f"{NAMES[library]} backward": layers}
        assert launches[NAMES[library]] == launches[f"{NAMES[library]} backward"] == layers > 0
        assert launches["attention_fwd"] == 0

"""Issue 5: "FP8 (`torch._scaled_mm`) is an opt-in rule with its error shown": who may, what runs, and what it costs."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import smedjan
from smedjan.backends.torch_reference.fp8 import fp8_rounded
from smedjan.cli import app
from smedjan.cli.progress import Bar
from smedjan.errors import ConfigError
from smedjan.models.registry import read_config
from smedjan.ops.fp8 import LARGEST
from smedjan.ops.linear import linear, linear_dx
from smedjan.runtime.select import backend
from smedjan.train.config import FinetuneConfig
from smedjan.train.eight_bits import ROWS, summary
from smedjan.train.parts import Finetune
from smedjan.train.plan import step_of
from tests.families import CASES, make_model
from tests.tolerances import UNIT_ROUNDOFF

STEPS, LR = 3, 5e-5
E4M3 = 2.0**-4
"""Unit roundoff: 3 bits of fraction."""

FINEST = 2.0**-10
"""Half the distance between two of e4m3's numbers below 2^-6, which have no more digits to lose."""


@pytest.fixture(scope="module")
def configured(tiny, tmp_path_factory):
    """Full fine-tuning in bfloat16 at one rate, one short row a step: the interpreter needs seconds for each."""
    root = tmp_path_factory.mktemp("fp8")
    rows = root / "rows.jsonl"
    texts = ({"prompt": f"hello {i} ", "completion": f"w {i % 3}"} for i in range(40))
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))

    def make(out="unused", **flags):
        named = {
            "model": str(tiny),
            "data": str(rows),
            "out": str(root / out),
            "method": "full",
            "backend": "cuda_triton",
            "dtype": "bfloat16",
            "train.batch_size": 1,
            "train.steps": STEPS,
            "optim.lr": LR,
            "optim.schedule": "constant",
            "optim.warmup": 0,
        }
        named.update({key.replace("__", "."): value for key, value in flags.items()})
        return FinetuneConfig.from_toml(None, named)

    return make


@pytest.fixture(scope="module")
def runs(configured):
    """(events, plan.json) of the same run in 8-bit floats, and without."""

    def run(out, **flags):
        events = []
        made = smedjan.finetune(configured(out, **flags), on_step=events.append)
        return events, json.loads((made.run_dir / "smedjan" / "plan.json").read_text())

    return run("fp8", train__fp8=True), run("plain")


@pytest.fixture(scope="module")
def weights(tiny):
    """The tiny model's, as the runs begin with them."""
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tiny / "model.safetensors").items()}


def planned(family="llama", case="plain", **options):
    model = make_model(family, CASES[family][case])
    data = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    given = {"dtype": "bfloat16", "batch": 1, "length": 16, "method": "full", "fp8": True, **options}
    return step_of(read_config(data, Path("config.json")), backend(given.pop("on", "cuda_triton")), **given)


def test_the_planned_program_quantises_every_linear_layer_of_the_blocks_and_no_other():
    micro, _ = planned()
    products = [call for call in micro.calls if call.node.op.name.startswith("fp8_linear")]
    assert all(call.label.startswith("triton fp8_quantize + cublas _scaled_mm") for call in products)
    taken = [t.node.attrs["name"] for call in products for t in call.node.inputs[1:] if t is not None]
    made = make_model("llama", CASES["llama"]["plain"])
    matrices = {name for name, p in made.named_parameters() if p.ndim == 2}
    assert set(taken) == matrices - {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(taken) == len(set(taken))
    launches = micro.launches()
    layers = made.config.num_hidden_layers
    # qkv, o, gate and up, down: one product each, of an input and a weight
    assert (launches["cublas _scaled_mm"], launches["fp8_quantize"]) == (4 * layers, 8 * layers)


def test_what_measures_the_model_computes_in_its_dtype(configured):
    """Evaluation, generation and saved weights are those of a bfloat16 model, as everybody else will run it."""
    parts = Finetune(configured(train__fp8=True))
    session, [batch] = parts.trainer().session, parts.steps.batches_for_step(0)
    evaluation = session.micro_program(session.form(batch, rows=16), ())
    for program in (evaluation, session.logits_program(session.form(batch))):
        assert not any(call.node.op.name.startswith("fp8") for call in program.calls)


def roundings(session, batch, names):
    """sqrt(sum over e4m3's roundings of (slope of the loss x largest size)^2), and the loss's gradients by name.

    An operand's slope, of x or of W, is what the backward pass makes: dx = dy W, dW = dy^T x, of a run without 8 bits.
    """
    values, graphs = {}, []

    def observe(node, outs):
        graphs.append(node.graph)
        values.update(zip(node.outputs, outs, strict=True))

    _, grads = session.micro(batch, names, num_items=batch.trained_tokens, observe=observe)
    nodes = graphs[0].nodes
    slopes = {node.inputs[1].node.attrs["name"]: values[node.outputs[0]] for node in nodes if node.op is linear_dx}
    total = 0.0
    for node in nodes:
        name = node.inputs[1].node.attrs["name"] if node.op is linear else None
        if name in session.config.linear_weights():
            for operand, slope in (
                (values[node.inputs[0]], slopes[name]),
                (session.parameters[name], grads[name]),
            ):
                size = operand.double().abs()
                largest = (E4M3 * size).maximum(FINEST / LARGEST * size.amax(-1, keepdim=True))
                total += float((largest * slope.double()).square().sum())
    return sqrt(total), grads


def test_losses_stay_within_what_e4m3_rounds(runs, configured):
    """Of a run without, at each step by at most

        2 lambda sqrt(sum_i (g_i d_i)^2) + sum_j |g_j| (2 c lr k + 2 u |w_j|)

    First: the roundings of this step. Each moves the loss by its slope g_i times what was rounded away, at most d_i:
    2^-4 of the number, or half the distance of the finest numbers. They are independent and of mean 0, so that by
    Hoeffding's inequality their sum exceeds lambda times the root with a probability of 2 exp(-lambda^2 / 2) (Higham
    and Mary 2019, "A new approach to probabilistic rounding error analysis"): lambda = 4, 0.07 %. Twice that, for what
    is of second order and for bfloat16's own roundings, 16 times finer. Second: the weights have gone apart.
    A step of AdamW moves each by at most c lr, with c^2 = sum a^2 / b over the shares a and b that its moments give to
    past gradients (Cauchy-Schwarz), 1.01 in the first steps; k steps, two runs, and two roundings to bfloat16.
    """
    losses = [np.array([event["loss"] for event in events if "loss" in event]) for events, _ in runs]
    reference = Finetune(configured(backend="torch_reference"))
    trainer = reference.trainer()
    for k in range(STEPS):
        [batch] = reference.steps.batches_for_step(k)
        spread, grads = roundings(trainer.session, batch, trainer.names)
        apart = 0.0
        for name, gradient in grads.items() if k else ():
            moved = (
                2 * 1.01 * LR * k + 2 * UNIT_ROUNDOFF[torch.bfloat16] * trainer.session.parameters[name].double().abs()
            )
            apart += float((gradient.double().abs() * moved).sum())
        off = abs(losses[0][k] - losses[1][k])
        assert 0 < off <= 2 * 4 * spread + apart, f"step {k}: {off:.3f}, bound {2 * 4 * spread + apart:.3f}"
        trainer.step([batch], number=k + 1, lr=LR)


def test_the_errors_of_a_run_are_those_of_its_first_batch(runs, configured, weights):
    """In float64, of what the first step's program computed: the float32 product beside it is off by its own roundings
    alone, of I terms each (Higham 2002, eq. 3.5)."""
    _, plan = runs[0]
    parts = Finetune(configured(train__fp8=True))
    trainer = parts.trainer()
    [batch] = parts.steps.batches_for_step(0)
    values = {}
    found = {}

    def observe(node, outs):
        if node.op.name.startswith("fp8_linear"):
            names = [t.node.attrs["name"] for t in node.inputs[1:] if t is not None]
            pieces = outs[0].split([weights[name].shape[0] for name in names], dim=-1)
            for name, y in zip(names, pieces, strict=True):
                x, weight = values[node.inputs[0]].double(), weights[name].double()
                exact = x @ weight.T
                rounding = x.shape[-1] * UNIT_ROUNDOFF[torch.float32] * (x.abs() @ weight.abs().T).norm()
                found[name.removesuffix(".weight")] = (
                    float((y.double() - exact).norm() / exact.norm()),
                    float(2 * rounding / exact.norm()),
                )
        values.update(zip(node.outputs, outs, strict=True))

    trainer.session.micro(batch, trainer.names, num_items=1.0, observe=observe)
    assert found.keys() == plan["fp8"].keys()
    assert len(found) == 14
    for layer, (error, rounding) in found.items():
        assert abs(plan["fp8"][layer] - error) <= rounding, layer


def test_a_run_shows_them_before_its_first_step(runs, capsys):
    (events, plan), (plain, plan_without) = runs
    assert "fp8" not in plan_without
    assert all("fp8" not in event for event in plain)
    errors = plan["fp8"]
    assert "header" in events[0]
    assert events[1] == {"step": 0, "fp8": summary(errors)}
    assert events[1]["fp8"]["worst"] == max(errors.values()) == errors[events[1]["fp8"]["worst_layer"]]
    assert events[1]["fp8"]["median"] == np.median(list(errors.values()))
    assert [event["step"] for event in events[2:] if "loss" in event] == [1, 2, 3]
    with Bar(STEPS) as bar:
        bar(events[1])
    shown = " ".join(capsys.readouterr().err.split())
    assert "fp8: 14 linear layers in 8-bit floats; relative error on the first batch: median 3." in shown


def test_a_dry_run_shows_them_on_normal_inputs(configured, weights, capsys):
    config = configured()
    words = ["finetune", "--model", config.model, "--data", str(config.data), "--method", "full", "--dtype", "bfloat16"]
    words += ["--backend", "cuda_triton", "--train.batch-size", "1", "--train.fp8", "--dry-run"]
    assert app.run([*words, "--json"]) == 0
    errors = json.loads(capsys.readouterr().out)["fp8"]
    assert len(errors) == 14
    for layer, error in errors.items():
        weight = weights[f"{layer}.weight"]
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, weight.shape[1]), dtype=np.float32))
        x = x.to(torch.bfloat16)
        exact = x.double() @ weight.double().T
        y = fp8_rounded(x).double() @ fp8_rounded(weight).double().T
        # The library's sum is rounded to bfloat16, this one is not.
        last = UNIT_ROUNDOFF[torch.bfloat16] * float(y.norm() / exact.norm())
        assert abs(error - float((y - exact).norm() / exact.norm())) <= last, layer
    assert app.run(words) == 0
    assert "8-bit floats; relative error on inputs of a unit normal: median 3." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "is for full fine-tuning, not lora; give --method full"),
        ({"method": "qlora"}, "is for full fine-tuning, not qlora; give --method full"),
        ({"on": "torch_reference"}, "torch_reference has no products of 8-bit floats; give --backend cuda_triton"),
        ({"on": "cpu_native"}, "cpu_native has no products of 8-bit floats; give --backend cuda_triton"),
        ({"dtype": "float32"}, "is for bfloat16, and this run computes in float32; give --dtype bfloat16"),
        ({"method": None}, "is for training; leave it out of a forward pass"),
        ({"family": "gpt2"}, "no linear layer of the blocks has a weight [out, in] of multiples of 16; leave it out"),
    ],
)
def test_who_may_not(options, message, configured):
    with pytest.raises(ConfigError) as caught:
        planned(**{"case": next(iter(CASES[options.get("family", "llama")])), **options})
    assert f"fp8: {message}" in str(caught.value)
    if options.get("method", "full") is not None and "family" not in options:
        flags = {"backend" if key == "on" else key: value for key, value in options.items()}
        with pytest.raises(ConfigError, match=r"^train\.fp8: ") as caught:
            Finetune(configured(**flags, train__fp8=True))
        assert message in str(caught.value)


@pytest.mark.parametrize(("capability", "able"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_without_8_bit_products_is_told(monkeypatch, capability, able):
    on = backend("cuda_triton")
    monkeypatch.setattr(on, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if able:
        assert on.fp8_measure(field="train.fp8")
    else:
        with pytest.raises(
            ConfigError, match=r"train\.fp8: 8-bit floats need compute capability 8\.9, and .* has 8\.0"
        ):
            on.fp8_measure(field="train.fp8")

"""Issue "cpu_native": the frozen forward pass of LoRA in 8-bit integers, opt-in with its error shown: who may, what
runs, what it costs, and how near the run without it stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import smedjan
from smedjan.backends.torch_reference.w8a8 import product
from smedjan.checkpoint import int8
from smedjan.checkpoint.raw import RawTensor
from smedjan.cli import app
from smedjan.cli.progress import Bar
from smedjan.errors import ConfigError
from smedjan.models.registry import read_config
from smedjan.ops.linear import linear_dw
from smedjan.runtime.select import backend
from smedjan.train.config import FinetuneConfig
from smedjan.train.eight_bits import ROWS, summary
from smedjan.train.parts import Finetune
from smedjan.train.plan import step_of
from tests.families import CASES, make_model
from tests.tolerances import UNIT_ROUNDOFF

STEPS, LR = 6, 2e-3
LAYERS = 14
"""Linear ones of the tiny model."""


@pytest.fixture
def config(configure):
    """LoRA at one rate."""

    def make(out="run", **flags):
        named = {"method": "lora", "backend": "cpu_native", "train__steps": STEPS, "optim__lr": LR}
        named |= {"optim__schedule": "constant", "optim__warmup": 0, "lora__rank": 4, "lora__alpha": 8.0}
        return configure(out, **{**named, **flags})

    return make


def ran(config):
    events = []
    made = smedjan.finetune(config, on_step=events.append)
    return made, events, json.loads((made.run_dir / "smedjan" / "plan.json").read_text())


def codes_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts, _, _ = int8.quantize(RawTensor.of(weight.float().numpy()))
    codes = np.frombuffer(parts[int8.CODES].data, np.int8).reshape(weight.shape)
    return torch.from_numpy(codes.copy()), torch.from_numpy(np.frombuffer(parts[int8.SCALE].data, np.float32).copy())


def test_codes_are_made_of_what_the_session_has(config):
    """Of PiSSA's residual, too; and nothing else of the session changes."""
    for flags in ({}, {"lora__init": "pissa"}, {"dtype": "bfloat16"}):
        session = Finetune(config(train__int8_forward=True, **flags)).trainer().session
        plain = Finetune(config(**flags)).trainer().session
        added = session.parameters.keys() - plain.parameters.keys()
        assert len(added) == 2 * LAYERS
        assert added == {f"{name}.{end}" for name in session.config.linear_weights() for end in ("int8", "scale")}
        for name in session.config.linear_weights():
            assert torch.equal(session.parameters[name], plain.parameters[name])
            codes, scale = codes_of(session.parameters[name])
            assert torch.equal(session.parameters[f"{name}.int8"], codes)
            assert torch.equal(session.parameters[f"{name}.scale"], scale)


def slopes(session, batch):
    """{weight: (x, dL/dy)} of every linear layer of the blocks at this batch, without codes."""
    values, graphs, names = {}, [], list(session.config.linear_weights())

    def observe(node, outs):
        graphs.append(node.graph)
        values.update(zip(node.outputs, outs, strict=True))

    session.micro(batch, names, num_items=batch.trained_tokens, observe=observe)
    outputs, found = graphs[0].outputs, {}
    for name in names:
        node = outputs[f"grad.{name}"].node
        assert node.op is linear_dw
        dy, x = (values[tensor] for tensor in node.inputs)
        found[name] = (x, dy)
    return found


def test_losses_stay_near_those_without(config):
    """At each step by at most

        2 sum over layers of |dL/dy| |y8 - y| + sum_j |g_j| 2 c lr k

    First: this step's products. The loss moves by the inner product of its slope and what a layer's y is off, at most
    the product of both norms (Cauchy-Schwarz); the second factor is the layer's measured error times |x W^T|. Twice
    that, for what is of second order. Second: the adapters have gone apart. A step of AdamW moves each by at most c lr,
    with c^2 = sum a^2 / b over the shares a and b that its moments give to past gradients (Cauchy-Schwarz), 1.01 in the
    first steps; k steps, two runs.
    """
    losses = [
        np.array([event["loss"] for event in ran(config(name, train__int8_forward=on))[1] if "loss" in event])
        for name, on in (("int8", True), ("plain", False))
    ]
    assert all(each[-1] < each[0] for each in losses), losses
    reference = Finetune(config("unused", backend="torch_reference"))
    trainer = reference.trainer()
    for k in range(STEPS):
        batches = reference.steps.batches_for_step(k)
        [batch] = batches
        _, grads = trainer.session.micro(batch, trainer.names, num_items=batch.trained_tokens)
        moved = sum(float(gradient.double().abs().sum()) for gradient in grads.values()) * 2 * 1.01 * LR * k
        here = 0.0
        for name, (x, dy) in slopes(trainer.session, batch).items():
            weight = trainer.session.parameters[name]
            off = product(x, *codes_of(weight), None).double() - x.double() @ weight.double().T
            here += float(dy.double().norm()) * float(off.norm())
        off = abs(losses[0][k] - losses[1][k])
        assert 0 < off <= 2 * here + moved, f"step {k}: {off:.2e}, bound {2 * here + moved:.2e}"
        trainer.step(batches, number=k + 1, lr=LR)


def test_cpu_native_computes_what_the_exact_backend_does(config):
    """Of one session's numbers: products of codes have the same bits; what differs are float32's own sums around them.
    They move an activation by some units in its last place, which may turn a code by one: a 127th of a row's largest,
    the size of coding itself. So gradients are held to the distance that coding makes."""
    made = {}
    for name, on in (("cpu_native", True), ("torch_reference", True), ("torch_reference", False)):
        parts = Finetune(config(train__int8_forward=on, backend=name))
        trainer = parts.trainer()
        for parameter in trainer.names:  # B starts as zeros, and nothing would reach A
            if ".lora_B" in parameter:
                shape = tuple(trainer.session.parameters[parameter].shape)
                trainer.session.parameters[parameter] = trainer.session.backend.from_raw(
                    RawTensor.of(np.random.default_rng(1).normal(0, 0.05, shape).astype(np.float32))
                )
        [batch] = parts.steps.batches_for_step(0)
        loss, grads = trainer.session.micro(batch, trainer.names, num_items=batch.trained_tokens)
        made[name, on] = float(loss), {key: array.double().clone() for key, array in grads.items()}
    (ours, fast), (exact, theirs), (plain, floats) = made.values()
    assert abs(ours - exact) < abs(exact - plain)
    for key, gradient in theirs.items():
        assert float((fast[key] - gradient).norm()) < float((gradient - floats[key]).norm()), key


def test_the_errors_of_a_run_are_those_of_its_first_batch(config):
    """In float64, of what the first step's program computed: the float32 product beside it is off by its own roundings
    alone, of I terms each (Higham 2002, eq. 3.5)."""
    _, _, plan = ran(config(train__int8_forward=True))
    parts = Finetune(config("again", train__int8_forward=True, backend="torch_reference"))
    trainer = parts.trainer()
    [batch] = parts.steps.batches_for_step(0)
    held, values, found = trainer.session.parameters, {}, {}

    def observe(node, outs):
        if node.op.name == "w8a8_linear":
            name = node.inputs[1].node.attrs["name"]
            x, weight = values[node.inputs[0]].double(), held[name].double()
            exact = x @ weight.T
            rounding = x.shape[-1] * UNIT_ROUNDOFF[torch.float32] * (x.abs() @ weight.abs().T).norm() / exact.norm()
            off = (outs[0].double() - exact).norm() / exact.norm()
            found[name.removesuffix(".weight")] = float(off), float(2 * rounding)
        values.update(zip(node.outputs, outs, strict=True))

    trainer.session.micro(batch, trainer.names, num_items=1.0, observe=observe)
    assert found.keys() == plan["int8_forward"].keys()
    assert len(found) == LAYERS
    first = "model.layers.0.self_attn.q_proj"
    error, rounding = found[first]  # what reaches it is the same on both backends, but for a norm's last digit
    assert abs(plan["int8_forward"][first] - error) <= rounding + 1e-2 * error
    for layer, (error, _) in found.items():
        assert plan["int8_forward"][layer] == pytest.approx(error, rel=0.1), layer
        assert 1e-3 < error < 2e-2


def test_a_run_shows_them_before_its_first_step(config, capsys):
    _, events, plan = ran(config(train__int8_forward=True))
    _, plain, plan_without = ran(config("plain"))
    assert "int8_forward" not in plan_without
    assert all("int8_forward" not in event for event in plain)
    errors = plan["int8_forward"]
    assert "header" in events[0]
    assert events[1] == {"step": 0, "int8_forward": summary(errors)}
    assert events[1]["int8_forward"]["worst"] == max(errors.values())
    assert events[1]["int8_forward"]["median"] == np.median(list(errors.values()))
    assert [event["step"] for event in events[2:] if "loss" in event] == list(range(1, STEPS + 1))
    [lowering] = {row["lowering"] for row in plan["ops"] if row["op"].startswith("w8a8")}
    assert lowering.startswith("native w8a8, ")
    with Bar(STEPS) as bar:
        bar(events[1])
    shown = " ".join(capsys.readouterr().err.split())
    assert "int8-forward: 14 linear layers in 8-bit integers; relative error on the first batch: median 0." in shown


def test_a_dry_run_shows_them_on_normal_inputs(config, capsys):
    made = config()
    words = ["finetune", "--model", made.model, "--data", str(made.data), "--backend", "cpu_native"]
    words += ["--train.int8-forward", "--dry-run"]
    assert app.run([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    errors = plan["int8_forward"]
    assert len(errors) == LAYERS
    assert plan["fp8"] == {}
    held = Finetune(config(train__int8_forward=True)).trainer().session.parameters
    for layer, error in errors.items():
        weight = held[f"{layer}.weight"]
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, weight.shape[1]), dtype=np.float32))
        exact = x.double() @ weight.double().T
        y = product(x, *codes_of(weight), None).double()
        rounding = x.shape[-1] * UNIT_ROUNDOFF[torch.float32] * (x.double().abs() @ weight.double().abs().T).norm()
        assert abs(error - float((y - exact).norm() / exact.norm())) <= float(2 * rounding / exact.norm()), layer
    assert app.run(words) == 0
    assert "8-bit integers; relative error on inputs of a unit normal: median 0." in capsys.readouterr().out
    assert app.run([*words[:-2], "--dry-run", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert without["int8_forward"] == {}
    codes = sum(array.nbytes for name, array in held.items() if name.endswith((".int8", ".scale")))
    assert plan["planned_bytes"] >= without["planned_bytes"] + codes, "the codes are planned for"


def test_the_evaluation_loss_is_the_float_models(config, write_rows):
    """What is measured and saved is LoRA over the weights as they are: the same as another session finds."""
    valid = write_rows([{"prompt": "hello 3 ", "completion": "world 0"}], "valid.jsonl")
    made, _, _ = ran(config(train__int8_forward=True, eval_data=str(valid)))
    found = smedjan.load(config().model, adapter=made.run_dir, backend="cpu_native")
    parts = Finetune(config("again", eval_data=str(valid)))
    [batch] = parts.eval_dataset.batches(batch_size=4, max_length=64, pad_to=16)
    loss, _ = found.session.micro(batch, (), num_items=batch.trained_tokens)
    assert made.eval_loss == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("flags", [{}, {"dtype": "bfloat16"}, {"lora__init": "pissa"}], ids=str)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(config, flags):
    on = {"train__int8_forward": True, "train__save_every": 2, **flags}
    whole = smedjan.finetune(config("whole", **on))

    class Stop(Exception):
        pass

    def stop(event):
        if event.get("step") == 4 and "loss" in event:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(config("parts", **on), on_step=stop)
    assert smedjan.finetune(config("parts", resume=True, **on)).weights_sha256 == whole.weights_sha256
    with pytest.raises(ConfigError, match=r"train.int8_forward: is false, and the run was started with another, true"):
        smedjan.finetune(config("parts", resume=True, **{**on, "train__int8_forward": False}))


@pytest.mark.parametrize(
    "flags",
    [
        {"lora__dropout": 0.1},
        {"lora__dora": True},
        {"lora__dora": True, "lora__dropout": 0.1},
        {"lora__init": "pissa"},
        {"lora__targets": "q_proj,down_proj"},
        {"lora__last_layers": 1},
        {"lora__modules_to_save": "embed_tokens"},
        {"dtype": "bfloat16"},
        {"train__packing": True, "train__max_length": 64},
        {"train__grad_accum": 2},
    ],
    ids=str,
)
def test_every_kind_of_lora_trains(config, flags):
    _, events, plan = ran(config(train__int8_forward=True, train__steps=12, optim__lr=1e-2, **flags))
    losses = [event["loss"] for event in events if "loss" in event]
    assert losses[-1] < losses[0], losses
    assert len(plan["int8_forward"]) == LAYERS


def planned(family="llama", **options):
    case = next(iter(CASES[family]))
    model = make_model(family, CASES[family][case])
    data = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    given = {"dtype": "float32", "batch": 1, "length": 16, "method": "lora", "int8_forward": True, **options}
    return step_of(read_config(data, Path("config.json")), backend(given.pop("on", "cpu_native")), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full"}, "is for lora, whose base is frozen and held whole, not full; give --method lora"),
        ({"method": "qlora"}, "is for lora, whose base is frozen and held whole, not qlora; give --method lora"),
        ({"on": "cuda_triton"}, "cuda_triton has no products of 8-bit integers; give --backend cpu_native"),
        ({"on": "mlx_metal"}, "mlx_metal has no products of 8-bit integers; give --backend cpu_native"),
        ({"method": None}, "is for training; leave it out of a forward pass"),
        ({"family": "gpt2"}, "no linear layer of the blocks has a weight [out, in]; leave it out"),
    ],
    ids=str,
)
def test_who_may_not(options, message, config):
    if options.get("on") == "mlx_metal":
        pytest.importorskip("mlx.core")
    with pytest.raises(ConfigError) as caught:
        planned(**options)
    assert f"int8_forward: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
    if options.get("method", "lora") is not None and "family" not in options:
        flags = {"backend" if key == "on" else key: value for key, value in options.items()}
        with pytest.raises(ConfigError, match=r"^train\.int8_forward: ") as caught:
            Finetune(config(**flags, train__int8_forward=True))
        assert message in str(caught.value)


def test_a_refused_command_is_one_line_and_exit_2(config, capsys):
    made = config()
    words = ["finetune", "--model", made.model, "--data", str(made.data), "--method", "full", "--dry-run"]
    assert app.run([*words, "--backend", "cpu_native", "--train.int8-forward"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(
        "train.int8_forward: is for lora, whose base is frozen and held whole, not full; give --method lora"
    )
    assert "\n" not in said


def test_the_graph_command_plans_it(config, capsys):
    words = [
        "graph",
        config().model,
        "--plan",
        "--method",
        "lora",
        "--backend",
        "cpu_native",
        "--int8-forward",
        "--json",
    ]
    assert app.run(words) == 0
    made = json.loads(capsys.readouterr().out)
    [found] = [row for row in made["ops"] if row["op"].startswith("w8a8")]
    assert found["op"] == "w8a8_lora_linear"
    assert found["lowering"].startswith("native w8a8, ")


def test_the_config_hash_knows_it():
    given = {"model": "m", "data": "d", "out": "o"}
    hashes = {FinetuneConfig.from_toml(None, {**given, "train.int8_forward": on}).config_hash() for on in (True, False)}
    assert len(hashes) == 2

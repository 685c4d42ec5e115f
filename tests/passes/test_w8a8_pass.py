"""Which products the pass takes, in every form that fusion leaves them in; that what measures a model has none; and the
gradients of a whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference.w8a8 import w8a8_linear
from smedjan.graph.lowering import RuleTable
from smedjan.graph.program import Program
from smedjan.models.decoder import Decoder, Form
from smedjan.models.registry import read_config
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from smedjan.train.int8_forward import lay
from tests.conftest import assert_bits, make_batch, make_peer, make_session
from tests.families import CASES, make_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def session_of(name: str, family: str = "llama", **lora) -> Session:
    model = make_model(family, CASES[family][next(iter(CASES[family]))])
    config = read_config({**model.config.to_dict(), "architectures": [type(model).__name__]}, Path("config.json"))
    settings = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ALL, **lora}
    return Session(backend(name), config, {}, "float32", lora=Lora(**settings), w8a8=config.linear_weights())


def micro(session: Session):
    form = Form(batch=1, seq=8, dtype="float32", rows=0 if session.backend.exact else 8)
    return session.micro_program(form, [name for name in session.specs() if ".lora_" in name])


def taken(program) -> list[list[str]]:
    """The weights of each product of 8-bit integers; their codes stand behind them, in the same order."""
    found = []
    for node in program.graph.nodes:
        if node.op.name in ("w8a8_linear", "w8a8_lora_linear"):
            names = [tensor.node.attrs["name"] for tensor in node.inputs[1:]]
            count = sum(name.endswith(".int8") for name in names)
            weights = names[:count]
            assert names[count : 3 * count] == [f"{w}.int8" for w in weights] + [f"{w}.scale" for w in weights]
            found.append(weights)
    return found


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("gate_proj",)},
        {"dropout": 0.1},
        {"dora": True},
        {"ranks": (("q_proj", 4),)},
        {"layers": (1,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["torch_reference", "cpu_native"])
def test_every_linear_layer_of_the_blocks_once(name, lora):
    """With an adapter or without, stacked or alone. The head, adapters and the backward pass are as they were."""
    session = session_of(name, **lora)
    program = micro(session)
    flat = [weight for weights in taken(program) for weight in weights]
    assert sorted(flat) == sorted(session.config.linear_weights())
    plain = micro(replace(session, w8a8=()))
    coded = set(session.config.linear_weights())
    for node in program.graph.nodes:
        if node.op.name in ("linear", "lora_linear", "linear_group", "lora_linear_group"):
            assert not coded & {t.node.attrs.get("name") for t in node.inputs[1:] if t is not None}, node

    def backward(of):
        return [node.op.name for node in of.graph.nodes if node.op.name.endswith(("_dx", "_dw", "_bwd", "_dx_add"))]

    if name == "torch_reference":
        assert backward(program) == backward(plain)


def test_stacked_projections_stay_one_product():
    session = session_of("cpu_native")
    program, layers = micro(session), session.config.num_hidden_layers
    assert [len(weights) for weights in taken(program)] == [3, 1, 2, 1] * layers
    launches = program.launches()
    assert launches["native w8a8 codes"] == launches["native w8a8 product"] == 4 * layers


def test_dropout_of_doras_direction_is_a_product_of_its_own():
    """Where dropout is on, DoRA multiplies what was dropped with the weight a second time: in codes as well."""
    session = session_of("torch_reference", dropout=0.1, dora=True)
    flat = [weight for weights in taken(micro(session)) for weight in weights]
    assert sorted(flat) == sorted(2 * session.config.linear_weights())


@pytest.mark.parametrize("name", ["torch_reference", "cpu_native"])
def test_what_measures_or_uses_the_model_reads_its_weights(name):
    session = session_of(name)
    form = Form(batch=1, seq=8, dtype="float32")
    rows = replace(form, rows=0 if session.backend.exact else 8)
    for program in (session.logits_program(form), session.micro_program(rows, ())):
        assert taken(program) == []
        assert not any(".int8" in tensor for tensor in program.graph.inputs)


STRAIGHT = RuleTable("straight through", parent=ATEN)


@STRAIGHT.rule("w8a8_linear")
def _straight(x, *tensors, biased):
    """The value of codes, the slope of the float layer: what autograd is to differentiate."""
    weight = tensors[0]
    bias = tensors[-1] if biased else None
    float_one = torch.nn.functional.linear(x, weight, bias)
    return w8a8_linear(x.detach(), *tensors, biased=biased) + (float_one - float_one.detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True}, {"targets": ("q_proj",)}], ids=str)
def test_gradients_are_autograds_straight_through(settings, dtype):
    """Of a whole model, to the bit: torch.autograd over the same forward pass, each product of codes having the value
    of codes and the slope of the float product beside it."""
    targets = settings.get("targets", ALL)
    peer = make_peer(dtype=dtype, **{key: value for key, value in settings.items() if key != "targets"})
    session = make_session(peer, lora=Lora(rank=2, alpha=4.0, dropout=0.0, targets=targets))
    base = {name: tuple(array.shape) for name, array in session.parameters.items()}
    shapes, generator = session.lora.shapes(base), torch.Generator().manual_seed(4)
    session.parameters.update({name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()})
    lay(session)
    batch = make_batch()
    loss, ours = session.micro(batch, list(shapes), num_items=batch.trained_tokens)

    decoder = Decoder(session.config, session.form(batch, rows=0))
    decoder.graph.output("loss", decoder.loss("x"))
    graph = session.forward(decoder, train=True)
    assert sum(node.op.name == "w8a8_linear" for node in graph.nodes) == len(session.w8a8)
    inputs = {**session.parameters, **session.batch_inputs(batch)}
    inputs["labels"] = session.host(batch.labels.reshape(-1), "int64")
    inputs["num_items"] = session.host(np.float32(batch.trained_tokens), "float32")
    leaves = {name: session.parameters[name].clone().requires_grad_() for name in shapes}
    made = Program(graph, STRAIGHT)({name: leaves.get(name, inputs.get(name)) for name in graph.inputs})["loss"]
    assert_bits(loss, made.detach(), "loss")
    for name, gradient in zip(shapes, torch.autograd.grad(made, list(leaves.values())), strict=True):
        assert_bits(ours[name], gradient, name)


def test_transposed_layers_are_left():
    session = session_of("cpu_native", "gpt2", targets=("c_attn", "c_proj"), transposed=True)
    assert taken(micro(session)) == []


def test_codes_stand_beside_the_weights():
    specs = session_of("cpu_native").specs()
    shape, _ = specs["model.layers.0.mlp.up_proj.weight"]
    assert specs["model.layers.0.mlp.up_proj.weight.int8"] == (shape, "int8")
    assert specs["model.layers.0.mlp.up_proj.weight.scale"] == (shape[:1], "float32")
    assert "model.embed_tokens.weight.int8" not in specs

"""The adapter pass: which modules it finds, what it leaves undifferentiated, masks that depend on place and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from smedjan.graph.grad import grad
from smedjan.graph.node import INPUT
from smedjan.models.decoder import Decoder, Form
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora, a_name, adapt, b_name
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from smedjan.train.step import Trainer
from tests.conftest import make_batch, make_peer, make_session

TARGETS = [
    ("q_proj",),
    ("q_proj", "v_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("self_attn.k_proj", "o_proj"),
    ("model.layers.1.mlp.up_proj",),
    ("lm_head",),
    ("layers.0.self_attn.q_proj", "q_proj"),
]


def shapes_of(session: Session) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in session.parameters.items()}


def lora_of(*targets: str, dropout: float = 0.0) -> Lora:
    return Lora(rank=3, alpha=6.0, dropout=dropout, targets=targets)


def with_adapters(lora: Lora, *, on: str = "torch_reference") -> Session:
    """A session whose adapters are both random, so that every mask reaches the loss."""
    session = make_session(make_peer(), lora=lora)
    session.backend = backend(on)
    generator = torch.Generator().manual_seed(4)
    for name, shape in lora.shapes(shapes_of(session)).items():
        session.parameters[name] = torch.randn(shape, generator=generator) * 0.2
    return session


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_shapes_are_pefts(targets):
    """Names, order and shapes of the adapters, for every way to write a target."""
    peer = make_peer(num_key_value_heads=2)
    ours = lora_of(*targets).shapes(shapes_of(make_session(peer)))
    model = get_peft_model(peer, LoraConfig(r=3, target_modules=list(targets)))
    theirs = {n.replace(".default", ""): tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("layers", [(1,), (0,), (0, 1)])
def test_layers_are_pefts_layers_to_transform(layers):
    peer = make_peer(num_key_value_heads=2)
    lora = Lora(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj", "lm_head"), layers=layers)
    ours = lora.shapes(shapes_of(make_session(peer)))
    wanted = LoraConfig(r=3, target_modules=list(lora.targets), layers_to_transform=list(layers))
    model = get_peft_model(peer, wanted)
    theirs = {n.replace(".default", ""): tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert list(ours.items()) == list(theirs.items())


def test_nothing_below_the_lowest_adapter_is_differentiated():
    session = make_session(make_peer())
    session.lora = Lora(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj"), layers=(1,))
    names = list(session.lora.shapes(shapes_of(session)))
    program = session.micro_program(Form(batch=2, seq=5), names)
    backward = [call.node.scope for call in program.calls if "backward" in call.node.scope]
    assert any(scope.startswith("layers.1.") for scope in backward)
    assert not any(scope.startswith("layers.0") for scope in backward)


@pytest.mark.parametrize("target", ["proj", "_proj", "elf_attn.q_proj", "q_proj.weight", "layers", ""])
def test_a_part_of_a_name_is_no_match(target):
    peer = make_peer()
    assert lora_of(target).shapes(shapes_of(make_session(peer))) == {}


def test_adapt_declares_exactly_the_shapes():
    """The graph's new inputs are `shapes`, each a float32 input, and nothing else is declared."""
    session = make_session(make_peer(num_key_value_heads=2))
    lora = lora_of("q_proj", "down_proj", "lm_head")
    decoder = Decoder(session.config, Form(batch=2, seq=5, dtype="bfloat16"))
    decoder.graph.output("logits", decoder.logits())
    adapted = adapt(decoder.graph, lora)
    new = {name: (t.shape, t.dtype) for name, t in adapted.inputs.items() if name not in decoder.graph.inputs}
    wanted = lora.shapes({name: t.shape for name, t in decoder.parameters.items()})
    assert new == {name: (shape, "float32") for name, shape in wanted.items()}


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native", "cuda_triton"])
def test_frozen_weights_get_no_gradient_nodes(on):
    """No weight gradient of a frozen matrix, embedding or norm is computed: only adapters' products are."""
    lora = lora_of("q_proj", "v_proj")
    session = make_session(make_peer(), lora=lora)
    session.backend = backend(on)
    adapters = list(lora.shapes(shapes_of(session)))
    rows = 0 if session.backend.exact else 4
    program = session.micro_program(Form(batch=2, seq=5, rows=rows), adapters)
    fused_ops = ("lora_linear_bwd", "lora_linear_group_bwd")
    products = [call.node for call in program.calls if call.node.op.name in ("linear_dw", *fused_ops)]
    made = [
        out.shape
        for node in products
        for out in node.outputs
        if out.shape in set(lora.shapes(shapes_of(session)).values())
    ]
    assert sorted(made) == sorted(program.graph.inputs[n].shape for n in adapters)
    assert not {call.node.op.name for call in program.calls} & {"embedding_bwd", "bias_grad"}
    for call in program.calls:
        if call.node.op.name == "rms_norm_bwd":
            assert call.node.attrs["needs"] == (True, False)
        if call.node.op.name == "linear_cross_entropy":
            assert call.node.attrs["grads"] == "x"
    # The input of the first layer's adapters needs no gradient: nothing below it is differentiated.
    below = [
        call.node for call in program.calls if call.node.op.name in ("linear_dx", "linear_group_dx", "rms_norm_bwd")
    ]
    fused = [node for node in products if node.op.name in fused_ops and node.scope.startswith("layers.0.")]
    assert not any(node.attrs["needs"][0] for node in fused)
    assert below
    assert not [node for node in below if node.scope == "layers.0.input_layernorm"]


def masks(lora: Lora, key: tuple[int, ...]) -> list[torch.Tensor]:
    """The forward's dropout masks in the order of their sites, as `observe` sees them."""
    session = with_adapters(lora)
    seen = {}

    def observe(node, made):
        if node.op.name == "keep_mask":
            seen.setdefault(node.attrs["site"], made[0].clone())

    session.micro(
        make_batch(),
        list(lora.shapes(shapes_of(make_session(make_peer())))),
        num_items=5,
        dropout_key=key,
        observe=observe,
    )
    return [seen[site] for site in sorted(seen)]


def test_dropout_masks_differ_by_site_seed_step_and_micro_batch():
    lora = lora_of("q_proj", "v_proj", dropout=0.4)
    base = masks(lora, (1, 2, 3, 4))
    assert len(base) == 4  # two targets in each of two layers
    others = [masks(lora, key)[0] for key in ((9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9))]
    every = [*base, *others]
    assert len({mask.numpy().tobytes() for mask in every}) == len(every)
    assert all(torch.equal(a, b) for a, b in zip(base, masks(lora, (1, 2, 3, 4)), strict=True))
    kept = torch.cat([mask.flatten() for mask in every]).mean().item()
    count = sum(mask.numel() for mask in every)
    assert abs(kept - 0.6) < 4 * (0.4 * 0.6 / count) ** 0.5


def test_backward_uses_the_forwards_mask():
    """With one more epsilon on A, the loss moves as its gradient says: forward and backward share the mask."""
    lora = lora_of("q_proj", "down_proj", dropout=0.4)
    session = with_adapters(lora)
    names = [name for name in session.parameters if ".lora_" in name]
    batch, key = make_batch(), (1, 0, 5, 0)
    _, grads = session.micro(batch, names, num_items=9, dropout_key=key)
    name = a_name("model.layers.0.self_attn.q_proj")
    step = 1e-2 * grads[name] / grads[name].norm()
    kept, losses = session.parameters[name], []
    for sign in (1, -1):
        session.parameters[name] = kept + sign * step
        losses.append(float(session.micro(batch, names, num_items=9, dropout_key=key)[0]))
    slope = float((grads[name] * step).sum())
    assert losses[0] - losses[1] == pytest.approx(2 * slope, rel=1e-2)


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native"])
def test_resumed_steps_draw_the_same_masks(on):
    """Four steps in one go, and two steps, a checkpoint's tensors, two more in a new session: the same bits."""
    lora = lora_of("q_proj", "up_proj", dropout=0.3)

    def trainer() -> Trainer:
        session = with_adapters(lora, on=on)
        return Trainer(session, [name for name in session.parameters if ".lora_" in name], AdamW(), seed=2**33 + 7)

    def steps(which, runner):
        return [runner.step([make_batch(seed=n), make_batch(seed=n + 50)], number=n, lr=1e-2) for n in which]

    whole = trainer()
    in_one_go = steps((1, 2, 3, 4), whole)
    first, second = trainer(), trainer()
    before = steps((1, 2), first)
    second.restore(first.weights(), first.optimizer_state())
    after = steps((3, 4), second)
    assert before + after == in_one_go
    for name in whole.names:
        assert torch.equal(whole.session.parameters[name], second.session.parameters[name]), name


def test_a_zero_b_changes_nothing():
    """An adapter as it is initialised, B = 0, leaves the logits' bits alone."""
    peer, lora = make_peer(), lora_of("q_proj", "down_proj")
    session = with_adapters(lora)
    for name in session.parameters:
        if name.endswith("lora_B.weight"):
            session.parameters[name] = torch.zeros_like(session.parameters[name])
    assert b_name("model.layers.0.self_attn.q_proj") in session.parameters
    batch = make_batch()
    assert np.array_equal(session.logits(batch).numpy(), make_session(peer).logits(batch).numpy())


def test_inputs_without_a_target_stay_as_they_were():
    session = make_session(make_peer())
    decoder = Decoder(session.config, Form(batch=1, seq=3))
    decoder.graph.output("logits", decoder.logits())
    adapted = adapt(decoder.graph, lora_of("nothing"))
    assert [node.op.name for node in adapted.nodes] == [node.op.name for node in decoder.graph.nodes]
    assert {n.attrs["name"] for n in adapted.nodes if n.op is INPUT} == set(decoder.graph.inputs)
    y = adapted.outputs["logits"]
    assert grad(y, [adapted.inputs["model.norm.weight"]], seeds={y: y})[0] is not None

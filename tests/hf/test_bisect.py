"""Bisection names the first layer and op where two computations part, and nothing where they do not.
Issue 4, Shows: "a mutation of each feature makes parity fail, and parity names the right layer and op"."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.cpu_native.table import RULES as CPU_RULES
from smedjan.backends.planned.table import KernelRule
from smedjan.backends.torch_reference.table import RULES
from smedjan.graph.lowering import Rule
from smedjan.hf import bisect as module
from smedjan.hf.bisect import bisect
from smedjan.hf.bisect_bound import bisect_bound
from smedjan.hf.parity import _rows as rows
from smedjan.hf.parity import compare
from smedjan.hf.peer import Peer
from smedjan.hf.watch import Parted, Watched, ulps
from tests.hf.tiny_families import FAMILIES, session_of, tiny

MODES = ("logits", "gradients", "decode")


def place(parted: Parted | None) -> tuple[int | None, str] | None:
    return None if parted is None else (parted.layer, parted.op)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_parts_where_all_is_equal(family, dtype):
    """And that says something: but for the mean's two steps in the loss, each value of ours is one of transformers'."""
    model = tiny(family, dtype=dtype)
    session, peer = session_of(model), Peer(model)
    batch = rows(session.config, "left", 0, 12)
    assert [bisect(session, peer, batch, mode) for mode in MODES] == [None] * 3
    ours, made = module._record(Watched.of(session), batch, "gradients", []), {}
    module._theirs(peer, batch, "gradients", [], lambda number, call: made.setdefault(call.key, number))
    alone = {tensor.node.op.name for tensor in module._wrong(ours, made, {})}
    assert alone == {"nll_loss", "divide_by"}
    assert len(ours.keys) > 250


MUTATIONS = [
    ("llama", {"rms_norm_eps": 2e-6}, (0, "rms_norm")),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}}, (0, "rope_tables")),
    ("llama", {"attention_bias": False}, (0, "linear")),
    ("mistral", {"sliding_window": 9}, (0, "attention")),
    ("gemma2", {"sliding_window": 9}, (1, "attention")),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, (2, "attention")),
    ("gemma2", {"attn_logit_softcapping": 40.0}, (0, "attention")),
    ("granite", {"embedding_multiplier": 3.0}, (None, "scale")),
    ("granite", {"residual_multiplier": 0.6}, (0, "scale")),
    ("granite", {"attention_multiplier": 0.31}, (0, "attention")),
    ("smollm3", {"no_rope_layers": [1, 1, 1]}, (1, "rope")),
    ("olmo2", {"rms_norm_eps": 1e-4}, (0, "rms_norm")),
    ("stablelm", {"layer_norm_eps": 1e-4}, (0, "layer_norm")),
    ("gpt_neox", {"use_parallel_residual": False}, (0, "add")),
    ("gpt_neox", {"hidden_act": "silu"}, (0, "silu")),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, (1, "attention")),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "change", "wanted"), MUTATIONS, ids=lambda value: str(value)[:60])
def test_a_mutation_is_named(family, change, wanted, mode):
    model = tiny(family)
    session = session_of(model, **change)
    parted = bisect(session, Peer(model), rows(session.config, "left", 0, 12), mode)
    assert place(parted) == wanted
    assert not parted.backward
    assert parted.ulp > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_distance_and_both_names(attention):
    """One weight of layer 1 is off: the ulps are those between the two products, and the module is named on both
    sides."""
    model = tiny("llama", attention=attention)
    session, name = session_of(model, attention=attention), "model.layers.1.mlp.down_proj"
    weight = session.parameters[f"{name}.weight"]
    weight[3, 5] *= 1 + 1e-5
    batch = rows(session.config, "none", 0, 12)
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    Peer(model).backward(batch)
    hook.remove()
    (x, theirs), ours = seen[0], None
    with torch.no_grad():
        ours = torch.nn.functional.linear(x, weight)
        wanted = ulps(ours.numpy(), theirs.numpy(), "float32")
    parted = bisect(session, Peer(model), batch, "logits")
    assert (parted.layer, parted.op, parted.module, parted.ulp) == (1, "linear", name, wanted)
    assert parted.peer == f"aten.mm in {name}"
    assert str(parted) == f"layer 1, linear: {wanted:,} ulp"


@pytest.mark.parametrize(("weight", "behind"), [("model.embed_tokens.weight", False), ("model.norm.weight", True)])
def test_outside_the_layers(weight, behind):
    model = tiny("llama")
    session = session_of(model)
    session.parameters[weight].mul_(1.5)
    parted = bisect(session, Peer(model), rows(session.config, "none", 0, 12), "logits")
    assert (parted.layer, parted.behind) == (None, behind)
    assert parted.module == weight.removesuffix(".weight")


def wrong(monkeypatch, table, op, factor=1.01):
    """The rule of one op gives results that are off by a factor."""
    honest = table._rules[op][0]
    if isinstance(honest, KernelRule):

        def bind(run, ins, outs, **attrs):
            honest.bind(run, ins, outs, **attrs)
            for out in outs:
                if out is not None:
                    run.library("wrong", torch.Tensor.mul_, out, factor)

        monkeypatch.setitem(table._rules, op, [replace(honest, bind=bind), *table._rules[op][1:]])
        return

    def run(*arrays, **attrs):
        made = honest.run(*arrays, **attrs)
        if isinstance(made, tuple):
            return tuple(None if value is None else value * factor for value in made)
        return made * factor

    monkeypatch.setitem(table._rules, op, [Rule(run, honest.label, honest.supports), *table._rules[op][1:]])


def test_a_wrong_gradient(monkeypatch):
    """The backward pass alone is wrong: the forward pass is not blamed, and the last layer comes first."""
    model = tiny("llama")
    session, batch = session_of(model), rows(session_of(model).config, "right", 0, 12)
    wrong(monkeypatch, RULES, "silu_bwd")
    assert bisect(session, Peer(model), batch, "logits") is None
    parted = bisect(session, Peer(model), batch, "gradients")
    assert (parted.layer, parted.op, parted.primitive, parted.backward) == (2, "glu", "silu_bwd", True)
    assert "(backward)" in str(parted)


def test_a_window_that_only_decoding_reaches():
    model = tiny("mistral", sliding_window=14)
    session = session_of(model, sliding_window=15)
    batch = rows(session.config, "none", 0, 12)
    assert bisect(session, Peer(model), batch, "logits") is None
    assert bisect(session, Peer(model), batch, "decode", prefills=(11,)) is None
    assert place(bisect(session, Peer(model), batch, "decode")) == (0, "attention")


@pytest.mark.parametrize("backend", ["cpu_native", "mlx_metal"])
def test_a_wrong_model_on_a_fast_backend_is_told_from_a_wrong_backend(backend):
    model = tiny("llama")
    peer, batch = Peer(model), rows(session_of(model).config, "left", 0, 12)
    assert bisect_bound(session_of(model, on=backend), peer, batch, "logits") is None
    session = session_of(model, rms_norm_eps=1e-3, on=backend)
    assert place(bisect_bound(session, peer, batch, "logits")) == (0, "rms_norm")


@pytest.mark.parametrize("op", ["rope", "rms_norm", "glu", "attention"])
def test_a_wrong_rule_of_a_fast_backend(monkeypatch, op):
    model = tiny("llama")
    session, peer = session_of(model, on="cpu_native"), Peer(model)
    wrong(monkeypatch, CPU_RULES, op)  # which decodes
    wrong(monkeypatch, PLANNED, op)  # which gives logits and gradients
    if op == "rope":
        wrong(monkeypatch, PLANNED, "qk_norm_rope")  # what becomes of two where nobody looks
    failed = [case for case in compare(session, peer, truth=peer.widened(), paddings=("left",)) if not case.holds]
    assert [case.mode for case in failed] == list(MODES)
    assert {place(case.parted) for case in failed} == {(0, op)}


def test_a_wrong_gradient_of_a_fast_backend(monkeypatch):
    """The forward pass is good. The first gradients that are off are those of what stands before the wrong op."""
    model = tiny("llama")
    session, peer = session_of(model, on="cpu_native"), Peer(model)
    wrong(monkeypatch, PLANNED, "glu_bwd")
    cases = list(compare(session, peer, truth=peer.widened(), paddings=("none",)))
    assert [case.mode for case in cases if not case.holds] == ["gradients"]
    parted = cases[1].parted
    assert (parted.layer, parted.backward) == (2, True)
    assert parted.module in ("model.layers.2.mlp.up_proj", "model.layers.2.mlp.gate_proj")

"""Bit equality can fail: each feature of a decoder, altered in our configuration alone, breaks it, and the bisection
names the first layer and op where it matters. Issue 4, Shows: "A mutation of each feature (window, softcap, each rope
kind, multiplier, qk-norm, norm order, bias) makes it fail, and `parity` names the right layer and op"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from smedjan.hf.bisect import bisect
from smedjan.hf.parity import _rows as rows
from smedjan.hf.parity import compare
from smedjan.hf.peer import Peer
from smedjan.models.decoder_config import DecoderConfig, Names
from smedjan.runtime.session import Session
from tests.families import CASES, make_model, make_session_of

Mutate = Callable[[DecoderConfig], DecoderConfig]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """`place`: (layer, op) where the two must part, None where that cannot be told. `seq`: tokens of the text, which
    windows and switches ask for."""

    family: str
    case: str
    mutate: Mutate
    place: tuple[int | None, str] | None
    dtype: str = "float32"
    mode: str = "logits"
    backward: bool = False
    seq: int = 11


def of(**changes: Any) -> Mutate:
    """Other values of fields of the configuration."""
    return lambda config: replace(config, **changes)


def layers(*numbers: int, **changes: Any) -> Mutate:
    """Other values of fields of these layers, of all where none is named."""

    def mutate(config: DecoderConfig) -> DecoderConfig:
        chosen = numbers or range(config.num_hidden_layers)
        made = (replace(layer, **changes) if n in chosen else layer for n, layer in enumerate(config.layers))
        return replace(config, layers=tuple(made))

    return mutate


def rope(**changes: Any) -> Mutate:
    """Other rotary positions in every layer that has any."""

    def mutate(config: DecoderConfig) -> DecoderConfig:
        turned = (
            layer if layer.rope is None else replace(layer, rope=replace(layer.rope, **changes))
            for layer in config.layers
        )
        return replace(config, layers=tuple(turned))

    return mutate


def norm(**changes: Any) -> Mutate:
    return lambda config: replace(config, norm=replace(config.norm, **changes))


def without(*roles: str) -> Mutate:
    """No bias in these layers."""
    return lambda config: replace(config, biases=config.biases - set(roles))


def modules(change: Callable[[dict[str, str]], dict[str, str]]) -> Mutate:
    """Other modules for the roles of a block."""

    def mutate(config: DecoderConfig) -> DecoderConfig:
        names = vars(config.names) | {"modules": change(dict(config.names.modules))}
        return replace(config, names=Names(**names))

    return mutate


def swapped(one: str, other: str) -> Mutate:
    return modules(lambda roles: {**roles, one: roles[other], other: roles[one]})


def renamed(old: str, new: str) -> Mutate:
    return modules(lambda roles: {new if role == old else role: name for role, name in roles.items()})


def dropped(*gone: str) -> Mutate:
    return modules(lambda roles: {role: name for role, name in roles.items() if role not in gone})


def scaled_layer(number: int, factor: float) -> Mutate:
    return lambda config: layers(number, scale=config.layers[number].scale * factor)(config)


def all_scaled(factor: float) -> Mutate:
    return lambda config: layers(scale=config.layers[0].scale * factor)(config)


LLAMA = {"family": "llama", "place": (0, "rope_tables")}
MUTATIONS: dict[str, Mutation] = {
    # windows
    "a wider window": Mutation(family="mistral", case="window", mutate=layers(window=5), place=(0, "attention")),
    "a narrower window": Mutation(family="mistral", case="window", mutate=layers(window=3), place=(0, "attention")),
    "no window": Mutation(family="mistral", case="odd-heads", mutate=layers(window=None), place=(0, "attention")),
    "a window that decoding alone reaches": Mutation(
        family="mistral", case="window-not-reached", mutate=layers(window=12), place=(0, "attention"), mode="decode"
    ),
    "a window in a global layer": Mutation(
        family="gemma3_text", case="plain", mutate=layers(5, window=4), place=(5, "attention")
    ),
    "no window in a local layer": Mutation(
        family="ministral", case="alternating", mutate=layers(2, window=None), place=(2, "attention")
    ),
    # scores
    "the softcap of scores": Mutation(
        family="gemma2", case="plain", mutate=of(attention_cap=45.0), place=(0, "attention")
    ),
    "no softcap of scores": Mutation(
        family="gemma2", case="tight-caps", mutate=of(attention_cap=0.0), place=(0, "attention")
    ),
    "a softcap where there is none": Mutation(
        family="gemma2", case="no-caps", mutate=of(attention_cap=50.0), place=(0, "attention")
    ),
    "the factor of scores": Mutation(
        family="granite", case="multipliers", mutate=all_scaled(1.01), place=(0, "attention")
    ),
    "the factor of one layer's scores": Mutation(
        family="gpt2", case="by-layer", mutate=scaled_layer(2, 3.0), place=(2, "attention")
    ),
    "the dtype of softmax": Mutation(
        family="gpt2",
        case="plain",
        mutate=of(softmax_dtype="float32"),
        place=(0, "attention"),
        dtype="bfloat16",
        mode="gradients",
    ),
    # logits
    "the softcap of logits": Mutation(
        family="gemma2", case="tight-caps", mutate=of(logit_cap=3.1), place=(None, "divide")
    ),
    # What is left out last leaves a value that transformers made too: there is nothing for the bisection to name.
    "no softcap of logits": Mutation(family="gemma3_text", case="cap-biases", mutate=of(logit_cap=0.0), place=None),
    "the factor of logits": Mutation(
        family="cohere2", case="biases-scale", mutate=of(logit_scale=0.31), place=(None, "scale")
    ),
    "the divisor of logits": Mutation(
        family="granite", case="multipliers", mutate=of(logit_divisor=3.1), place=(None, "divide")
    ),
    # rotary positions
    "theta": Mutation(**LLAMA, case="plain", mutate=rope(rope_theta=10001.0)),
    "theta of global layers": Mutation(
        family="gemma3_text",
        case="scaled-global",
        mutate=lambda config: layers(1, rope=replace(config.layers[1].rope, rope_theta=1e4))(config),
        place=(1, "rope_tables"),
    ),
    "theta of local layers": Mutation(
        family="olmo3",
        case="scaled-global",
        mutate=lambda config: layers(1, 3, rope=replace(config.layers[1].rope, rope_theta=1e4))(config),
        place=(1, "rope_tables"),
    ),
    "linear: factor": Mutation(**LLAMA, case="rope-linear", mutate=rope(factor=4.01)),
    "dynamic: factor": Mutation(**LLAMA, case="rope-dynamic", mutate=rope(factor=2.01), seq=15),
    "dynamic: the length": Mutation(**LLAMA, case="rope-dynamic", mutate=rope(max_position_embeddings=13), seq=15),
    "llama3: factor": Mutation(**LLAMA, case="rope-llama3", mutate=rope(factor=8.1)),
    "llama3: low_freq_factor": Mutation(**LLAMA, case="rope-llama3", mutate=rope(low_freq_factor=0.5)),
    "llama3: high_freq_factor": Mutation(**LLAMA, case="rope-llama3", mutate=rope(high_freq_factor=5.5)),
    "llama3: the length": Mutation(**LLAMA, case="rope-llama3", mutate=rope(original_max_position_embeddings=16)),
    "yarn: factor": Mutation(**LLAMA, case="rope-yarn", mutate=rope(factor=4.1)),
    "yarn: the length": Mutation(**LLAMA, case="rope-yarn-all", mutate=rope(original_max_position_embeddings=32)),
    "yarn: beta_fast": Mutation(**LLAMA, case="rope-yarn-all", mutate=rope(beta_fast=8.0)),
    "yarn: beta_slow": Mutation(**LLAMA, case="rope-yarn-all", mutate=rope(beta_slow=1.0)),
    "yarn: mscale": Mutation(**LLAMA, case="rope-yarn-all", mutate=rope(mscale=0.8)),
    "yarn: mscale_all_dim": Mutation(**LLAMA, case="rope-yarn-all", mutate=rope(mscale_all_dim=0.6)),
    "yarn: attention_factor": Mutation(**LLAMA, case="rope-yarn", mutate=rope(attention_factor=1.1)),
    "yarn: truncate": Mutation(**LLAMA, case="rope-yarn-all", mutate=rope(truncate=True)),
    "longrope: short_factor": Mutation(**LLAMA, case="rope-longrope", mutate=rope(short_factor=(1.0, 1.5, 2.0, 2.6))),
    "longrope: long_factor": Mutation(
        **LLAMA, case="rope-longrope", mutate=rope(long_factor=(2.0, 3.0, 4.0, 5.1)), seq=15
    ),
    "longrope: the switch": Mutation(
        **LLAMA, case="rope-longrope", mutate=rope(original_max_position_embeddings=16, attention_factor=1.2), seq=15
    ),
    "longrope: factor": Mutation(**LLAMA, case="rope-longrope", mutate=rope(factor=5.0)),
    "another kind": Mutation(**LLAMA, case="rope-linear", mutate=rope(rope_type="default")),
    "the part that turns": Mutation(
        family="phi3", case="partial", mutate=rope(partial_rotary_factor=1.0), place=(0, "rope_tables")
    ),
    "halves for neighbours": Mutation(family="helium", case="plain", mutate=of(interleaved=False), place=(0, "rope")),
    "neighbours for halves": Mutation(family="llama", case="plain", mutate=of(interleaved=True), place=(0, "rope")),
    "rotation in the model's dtype": Mutation(
        family="cohere2", case="plain", mutate=of(rope_upcast=""), place=(0, "rope"), dtype="bfloat16"
    ),
    "tables in the model's dtype": Mutation(
        family="olmo2",
        case="plain",
        mutate=of(rope_upcast="", rope_dtype=""),
        place=(0, "rope_tables"),
        dtype="bfloat16",
    ),
    "positions in a layer that has none": Mutation(
        family="smollm3",
        case="window",
        mutate=lambda config: layers(1, rope=config.layers[0].rope)(config),
        place=(1, "rope"),
    ),
    "a layer that turns does not": Mutation(
        family="smollm3", case="plain", mutate=layers(2, rope=None), place=(2, "attention")
    ),
    # multipliers
    "the factor of embeddings": Mutation(
        family="granite", case="multipliers", mutate=of(embedding_scale=12.1), place=(None, "scale")
    ),
    "embeddings as they are": Mutation(
        family="gemma", case="plain", mutate=of(embedding_scale=1.0), place=(0, "rms_norm")
    ),
    "the factor of embeddings, unrounded": Mutation(
        family="gemma", case="plain", mutate=of(round_embedding_scale=False), place=(None, "scale"), dtype="bfloat16"
    ),
    "the factor of residuals": Mutation(
        family="granite", case="multipliers", mutate=of(residual_scale=0.23), place=(0, "scale")
    ),
    # norms
    "eps": Mutation(family="qwen2", case="plain", mutate=norm(eps=2e-6), place=(0, "rms_norm")),
    "eps of a layer norm": Mutation(family="starcoder2", case="plain", mutate=norm(eps=2e-5), place=(0, "layer_norm")),
    "the offset": Mutation(family="gemma3_text", case="plain", mutate=norm(offset=0.0), place=(0, "rms_norm")),
    "the weight before the cast": Mutation(
        family="olmo2", case="plain", mutate=norm(weight_cast="before"), place=(0, "rms_norm"), dtype="bfloat16"
    ),
    "the weight behind the cast": Mutation(
        family="mistral", case="window", mutate=norm(weight_cast="after"), place=(0, "rms_norm"), dtype="bfloat16"
    ),
    "a fused layer norm": Mutation(family="cohere", case="plain", mutate=norm(composed=False), place=(0, "layer_norm")),
    "the norms of q and k swapped": Mutation(
        family="qwen3", case="plain", mutate=swapped("q_norm", "k_norm"), place=(0, "rms_norm")
    ),
    "norms over heads left out": Mutation(family="gemma3_text", case="plain", mutate=of(qk_norm=""), place=(0, "rope")),
    "the norm before for the norm behind": Mutation(
        family="olmo2", case="plain", mutate=renamed("attn_out", "attn_in"), place=(0, "rms_norm")
    ),
    "two norms swapped": Mutation(
        family="gemma2", case="plain", mutate=swapped("attn_out", "mlp_in"), place=(0, "rms_norm")
    ),
    "the norm behind left out": Mutation(family="glm4", case="plain", mutate=dropped("mlp_out"), place=(0, "add")),
    # biases
    **{
        f"the bias of {role}": Mutation(family="llama", case="biases-tied", mutate=without(role), place=(0, "linear"))
        for role in ("q", "k", "v", "o", "gate", "up", "down")
    },
    "the bias of qkv": Mutation(family="gpt_neox", case="parallel", mutate=without("qkv"), place=(0, "linear")),
    "the bias of an output": Mutation(family="seed_oss", case="biases", mutate=without("o"), place=(0, "linear")),
    "the bias of an MLP without a gate": Mutation(
        family="starcoder2", case="plain", mutate=without("up"), place=(0, "linear")
    ),
    "the biases of norms": Mutation(family="stablelm", case="plain", mutate=norm(bias=False), place=(0, "layer_norm")),
    # the block
    "one after the other": Mutation(
        family="stablelm",
        case="parallel",
        mutate=lambda config: replace(renamed("attn_in", "mlp_in")(config), parallel="", names=config.names),
        place=(0, "linear"),
    ),
    "side by side": Mutation(
        family="gpt_neox", case="sequential", mutate=of(parallel="mlp_first"), place=(0, "layer_norm")
    ),
    "the order of residuals": Mutation(
        family="gpt_neox", case="parallel", mutate=of(parallel="residual_first"), place=(0, "add")
    ),
    "the activation": Mutation(family="arcee", case="plain", mutate=of(hidden_act="silu"), place=(0, "silu")),
    "GELU by tanh": Mutation(family="starcoder2", case="plain", mutate=of(hidden_act="gelu"), place=(0, "gelu")),
    "the activation of a gate": Mutation(family="glm", case="plain", mutate=of(hidden_act="gelu"), place=(0, "glu")),
    "how q, k and v are cut": Mutation(family="gpt2", case="plain", mutate=of(qkv="heads"), place=(0, "attention")),
    # the head, and what has no gradient
    "a head of its own": Mutation(
        family="llama", case="biases-tied", mutate=of(tie_word_embeddings=False), place=(None, "linear")
    ),
    "the embedding for a head": Mutation(
        family="mistral", case="window", mutate=of(tie_word_embeddings=True), place=(None, "linear")
    ),
    "the row that gets no gradient": Mutation(
        family="llama",
        case="plain",
        mutate=of(padding_idx=None),
        place=(None, "embedding"),
        mode="gradients",
        backward=True,
    ),
}


def mutated(honest: Session, mutate: Mutate) -> Session:
    """The same weights under another configuration; a head that was tied gets one of its own."""
    parameters = dict(honest.parameters)
    if "lm_head.weight" not in parameters:
        generator = torch.Generator().manual_seed(9)
        embedding = parameters[honest.config.embedding]
        parameters["lm_head.weight"] = torch.randn(embedding.shape, generator=generator).to(embedding.dtype) * 0.2
    return replace(honest, config=mutate(honest.config), parameters=parameters)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_breaks_equality_and_is_named(name: str) -> None:
    mutation = MUTATIONS[name]
    settings = CASES[mutation.family][mutation.case]
    model = make_model(mutation.family, settings, dtype=mutation.dtype, attention="eager")
    honest, peer = make_session_of(model, attention="eager"), Peer(model)
    batch = rows(honest.config, "none", 0, mutation.seq)
    if honest.config.padding_idx is not None:
        batch.input_ids[:, 3:5] = honest.config.padding_idx
    assert bisect(honest, peer, batch, mutation.mode) is None
    session = mutated(honest, mutation.mutate)
    if mutation.mode == "logits":
        ours = session.logits(batch).float().numpy()
        theirs = peer.backward(batch, gradients=False)[0]["logits"]
        assert not np.array_equal(ours, theirs)
    parted = bisect(session, peer, batch, mutation.mode)
    assert (None if parted is None else (parted.layer, parted.op)) == mutation.place
    assert parted is None or parted.backward == mutation.backward


def test_a_step_left_out_behind_the_head_is_named() -> None:
    """Every value of ours is one of transformers' then: parity names the output, and what transformers does next."""
    model = make_model("gemma3_text", CASES["gemma3_text"]["cap-biases"], attention="eager")
    session = mutated(make_session_of(model, attention="eager"), of(logit_cap=0.0))
    case = next(compare(session, Peer(model), paddings=("none",)))
    assert (case.mode, case.holds) == ("logits", False)
    assert case.parted is not None
    assert (case.parted.layer, case.parted.op, case.parted.peer) == (None, "output", "a step that follows lm_head")


def test_every_field_that_computes_is_mutated() -> None:
    """A feature that is added to DecoderConfig has to be broken here, too."""
    touched: set[str] = set()
    for mutation in MUTATIONS.values():
        model = make_model(mutation.family, CASES[mutation.family][mutation.case], attention="eager")
        old = make_session_of(model, attention="eager").config
        new = mutation.mutate(old)
        touched |= {name for name in vars(old) if getattr(old, name) != getattr(new, name)}
    assert touched == set(DecoderConfig.__dataclass_fields__) - NOT_MUTATED


NOT_MUTATED = {
    # another shape of a parameter, which the checkpoint refuses
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "conv1d"),
    # names, and what does not compute
    *("model_type", "architecture", "stored", "accepted", "buffers", "dropout", "data", "defaults", "sdpa"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "restart_after"),
}

"""Tiny models of every family, made by transformers, and smedjan's sessions over copies of their weights.

`CASES` holds, for each `model_type`, the keyword arguments of transformers' configuration class: several models a
family, with odd head counts, windows shorter than the text, each kind of rotary positions, biases on and off.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from smedjan.models.registry import ARCHITECTURES, read_config
from smedjan.runtime.select import backend
from smedjan.runtime.session import Cache, Session
from tests.conftest import PAD, VOCAB, assert_bits

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in BASE.items() if key != "head_dim"}
PLAIN_HEADS = {key: value for key, value in NO_HEAD_DIM.items() if key != "num_key_value_heads"}
ODD = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
WINDOW = {"sliding_window": 4}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [2.0, 3.0, 4.0, 5.0]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    # A theta that puts the ramp's two ends inside the four frequencies of a head.
    "yarn-all": {
        "rope_type": "yarn",
        "rope_theta": 10.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": 12,
    },
}


def _with_rope(kind: str) -> dict[str, Any]:
    """A model that grows past its original length within the text, where the kind has a switch there."""
    short = {"max_position_embeddings": 12} if kind == "dynamic" else {}
    return {**BASE, **short, "rope_parameters": {"rope_theta": 10000.0, **ROPES[kind]}}


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": BASE,
        "odd-heads": {**BASE, **ODD},
        # The rows of a head do not begin at multiples of 16 bytes: torch's products of one query see that.
        "heads-of-10": {**BASE, "head_dim": 10},
        "biases-tied": {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        **{f"rope-{kind}": _with_rope(kind) for kind in ROPES},
    },
    "mistral": {
        "window": {**BASE, **WINDOW},
        "no-window": {**BASE, "sliding_window": None},
        "window-not-reached": {**BASE, "sliding_window": 32},
        "odd-heads": {**BASE, **ODD, **WINDOW},
    },
    "ministral": {
        "alternating": {**BASE, **WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "all-local": {**BASE, **WINDOW},
    },
    "qwen2": {
        "plain": BASE,
        "window": {**BASE, **WINDOW, "use_sliding_window": True, "max_window_layers": 2},
        "tied-yarn": {**BASE, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, **ROPES["yarn"]}},
    },
    "qwen3": {
        "plain": BASE,
        "window-biases": {
            **BASE,
            **WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        "odd-heads": {**BASE, **ODD},
    },
    "gemma": {"plain": BASE, "untied-biases": {**BASE, "tie_word_embeddings": False, "attention_bias": True}},
    "gemma2": {
        "plain": {**BASE, **WINDOW, "query_pre_attn_scalar": 20},
        "tight-caps": {**BASE, **WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "no-caps": {**BASE, **WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3_text": {
        "plain": {**BASE, **WINDOW, "query_pre_attn_scalar": 20, "num_hidden_layers": 7},
        "cap-biases": {**BASE, **WINDOW, "final_logit_softcapping": 3.0, "attention_bias": True},
        "scaled-global": {
            **BASE,
            **WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, **ROPES["linear"]},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    },
    "phi3": {
        "plain": BASE,
        "window": {**BASE, **WINDOW},
        "partial": {**BASE, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "longrope": {
            **BASE,
            "original_max_position_embeddings": 12,
            "rope_parameters": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        },
    },
    "granite": {
        "multipliers": {
            **BASE,
            "embedding_multiplier": 12.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
        "biases-tied": {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    "smollm3": {
        "plain": BASE,
        "window": {**BASE, **WINDOW, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0]},
        "biases-untied": {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    },
    "olmo2": {"plain": BASE, "biases": {**BASE, "attention_bias": True}, "odd-heads": {**BASE, **ODD}},
    "olmo3": {
        "plain": {**BASE, **WINDOW},
        "scaled-global": {
            **BASE,
            **WINDOW,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, **ROPES["yarn"]},
                "sliding_attention": {"rope_theta": 5e5, "rope_type": "default"},
            },
        },
    },
    "starcoder2": {
        "plain": BASE,
        "no-biases-window": {**BASE, **WINDOW, "use_bias": False},
        "untied": {**BASE, "tie_word_embeddings": False, "hidden_act": "gelu"},
    },
    "cohere2": {
        "plain": {**NO_HEAD_DIM, **WINDOW},
        "biases-scale": {**NO_HEAD_DIM, **WINDOW, "attention_bias": True, "logit_scale": 0.3},
    },
    "stablelm": {
        "plain": NO_HEAD_DIM,
        "head-norms": {**NO_HEAD_DIM, "use_qkv_bias": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
        "parallel": {**NO_HEAD_DIM, "use_parallel_residual": True},
    },
    "gpt_neox": {
        "parallel": PLAIN_HEADS,
        "sequential": {**PLAIN_HEADS, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5},
        "odd-heads-tied": {**PLAIN_HEADS, "hidden_size": 56, "num_attention_heads": 7, "tie_word_embeddings": True},
    },
    "gpt2": {
        "plain": {**GPT2, "n_inner": 80},
        "by-layer": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        "untied-unscaled": {**GPT2, "scale_attn_weights": False, "tie_word_embeddings": False},
    },
    "arcee": {"plain": BASE, "biases": {**BASE, "attention_bias": True, "mlp_bias": True}},
    "seed_oss": {"plain": BASE, "biases": {**BASE, "attention_out_bias": True, "mlp_bias": True}},
    "glm": {"plain": BASE, "whole-heads": {**BASE, "attention_bias": False, "partial_rotary_factor": 1.0}},
    "glm4": {"plain": BASE},
    "helium": {"plain": BASE, "biases": {**BASE, "attention_bias": True, "mlp_bias": True}},
    "ernie4_5": {"plain": BASE, "biases": {**BASE, "use_bias": True}},
    "vaultgemma": {"plain": {**BASE, **WINDOW, "query_pre_attn_scalar": 20}},
    "exaone4": {
        "plain": {**BASE, **WINDOW},
        "no-window": {**BASE, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    },
    "cohere": {"plain": NO_HEAD_DIM, "biases": {**NO_HEAD_DIM, "attention_bias": True}},
}

ALL = [(family, name) for family, cases in CASES.items() for name in cases]


def make_model(
    family: str,
    settings: dict[str, Any],
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
    calm: bool = False,
) -> PreTrainedModel:
    """transformers' model with every weight random. Frequencies stay float32, as from_pretrained keeps them. `calm`:
    norms near 1 and biases near 0, as a trained model has them.

    ValueError where transformers does not have this `attention` for the family.
    """
    torch.manual_seed(seed)
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    config = AutoConfig.for_model(family, **copied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif calm:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    if dtype == "bfloat16":
        kept = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
        model = model.to(torch.bfloat16)
        for name, buffer in kept.items():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, buffer)
    return model.eval()


def make_session_of(
    model: PreTrainedModel, *, attention: str = "sdpa", on: str = "torch_reference", **changes: Any
) -> Session:
    """A session over copies of the model's weights; `changes` edit its config.json, for mutations."""
    family = model.config.model_type
    data = {**model.config.to_dict(), "architectures": [ARCHITECTURES[family].ARCHITECTURE], **changes}
    config = read_config(data, Path("config.json"))
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen, dtype = backend(on), str(model.dtype).removeprefix("torch.")
    if not chosen.exact:
        to_raw = backend("torch_reference").to_raw
        parameters = {name: chosen.from_raw(to_raw(array)) for name, array in parameters.items()}
    return Session(chosen, config, parameters, dtype, attention=attention)


ATTENTIONS = ("sdpa", "eager")
PADDINGS = ("none", "left", "right")
REFUSES = {"gemma2": ("sdpa",), "vaultgemma": ("sdpa",)}
"""What transformers does not compute for a family: their scores are capped."""
DECODED = 4


def attentions(family: str) -> tuple[str, ...]:
    return tuple(name for name in ATTENTIONS if name not in REFUSES.get(family, ()))


def steps_of(batch: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(tokens, mask over all so far): the batch as a prefill, then its first tokens once more, one a row."""
    ids, mask = batch.peer["input_ids"], batch.peer["attention_mask"]
    yield ids, mask
    for step in range(DECODED):
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], dim=1)
        yield ids[:, step : step + 1], mask


def compare(session: Session, model: PreTrainedModel, batch: Any) -> None:
    """AssertionError with the name of the first tensor that is not equal to the bit: logits, loss, every gradient, the
    logits of a prefill and of each token decoded after it."""
    out = model(**batch.peer)
    model.zero_grad()
    out.loss.backward()
    assert_bits(session.logits(batch), out.logits.detach(), "logits")
    named = dict(model.named_parameters())
    loss, gradients = session.micro(batch, list(named), num_items=batch.trained_tokens)
    assert_bits(loss, out.loss.detach(), "loss")
    for name, parameter in named.items():
        # What a layer's window or an unread position cuts off has no gradient there, and zeros here.
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_bits(gradients[name], theirs, f"gradient of {name}")
    cache = Cache(session, batch=len(batch.input_ids), capacity=batch.input_ids.shape[1] + DECODED)
    past = None
    with torch.no_grad():
        for step, (ids, mask) in enumerate(steps_of(batch)):
            made = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
            past = made.past_key_values
            ours = cache.feed(ids.numpy(), None if mask is None else mask.numpy())
            assert_bits(ours, made.logits, f"token {step}" if step else "prefill")

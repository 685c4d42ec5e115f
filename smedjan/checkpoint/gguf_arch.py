"""What llama.cpp computes under each `general.architecture`: which of our families it has, and what it takes from them.

Its graphs are fixed per architecture: an attribute that a graph does not read would be dropped without a word, so that
`refuse` names it instead; where the file can say it and llama.cpp merely does not listen, it is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path

from smedjan.errors import ConfigError
from smedjan.models.decoder_config import DecoderConfig

GELU = frozenset(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu"))
_QKV = frozenset(("q", "k", "v"))
_ALL = frozenset(("q", "k", "v", "o", "gate", "up", "down"))
_STATIC = frozenset(("linear", "yarn"))

STEMS = {
    "attn_in": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "qkv": "attn_qkv",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "attn_out": "post_attention_norm",
    "mlp_in": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "gate_up": "ffn_up",
    "down": "ffn_down",
    "mlp_out": "post_ffw_norm",
}
"""A module's name within `blk.N.`, by its role."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One graph of llama.cpp.

    families     the model types that it computes, the one that an import gives first
    pairs        it turns neighbouring dims of a head; else the halves, as most of transformers does
    stems        where its names differ from STEMS
    biases       roles that may have a bias; `needed`: that must have one
    head         "optional" (the embedding where there is none), "own" (always there) or "tied" (never)
    square       attention is as wide as the model: A D = H
    scalings     the rope types that it knows, besides the default
    windows      it heeds `attention.sliding_window`; `every`: each n-th layer sees everything where no pattern is given
    check        (field of config.json, what it says, remedy) of whatever else its graph cannot do
    """

    name: str
    families: tuple[str, ...]
    pairs: bool = False
    stems: dict[str, str] = field(default_factory=dict)
    biases: frozenset[str] = _QKV
    needed: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset(("silu",))
    head: str = "optional"
    square: bool = False
    scalings: frozenset[str] = _STATIC
    windows: bool = False
    every: int = 0
    check: Callable[[DecoderConfig], Iterator[tuple[str, str, str]]] = lambda config: iter(())

    def stem(self, role: str) -> str:
        return self.stems.get(role) or STEMS[role]


def gemma_scale(config: DecoderConfig, big: int) -> float:
    """The factor of scores that llama.cpp takes for Gemma 2 and 3: their 27B (`big` layers) divides by H / A."""
    if config.num_hidden_layers == big:
        return (config.hidden_size // config.num_attention_heads) ** -0.5
    return config.head_dim**-0.5


def _scale(config: DecoderConfig, expected: float, name: str) -> Iterator[tuple[str, str, str]]:
    for layer in config.layers:
        if not isclose(layer.scale, expected, rel_tol=1e-6):
            yield name, f"makes the factor of scores {layer.scale:g}", f"llama.cpp always takes {expected:g}"
            return


def _gemma2(config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    yield from _scale(config, gemma_scale(config, 46), "query_pre_attn_scalar")
    if not config.attention_cap:
        yield "attn_logit_softcapping", "is null", "llama.cpp always caps Gemma 2's scores"
    if not config.logit_cap:
        yield "final_logit_softcapping", "is null", "llama.cpp always caps Gemma 2's logits"


def _gemma3(config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    yield from _scale(config, gemma_scale(config, 62), "query_pre_attn_scalar")
    local = {layer.rope for layer in config.layers if layer.window is not None and layer.rope is not None}
    if any(rope.rope_type != "default" for rope in local):
        yield "rope_parameters.sliding_attention", "scales positions", "llama.cpp scales those of global layers alone"


def _smollm3(config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    if any((layer.rope is None) == bool((number + 1) % 4) for number, layer in enumerate(config.layers)):
        yield "no_rope_layers", "are not each fourth one", "llama.cpp knows no other pattern"


def _olmo(config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    thetas = {layer.rope.rope_theta for layer in config.layers if layer.rope is not None}
    if len(thetas) > 1:
        yield "rope_parameters", f"have thetas {sorted(thetas)}", "llama.cpp takes one for all layers"
    local = {layer.rope for layer in config.layers if layer.window is not None and layer.rope is not None}
    if any(rope.rope_type != "default" for rope in local):
        yield "rope_parameters.sliding_attention", "scales positions", "llama.cpp scales those of global layers alone"


def _cohere2(config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    if config.window is None:
        yield "sliding_window", "is not used", "llama.cpp needs one for Cohere 2"


def _exaone4(config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    if config.window is not None and config.num_hidden_layers != 64:
        yield "sliding_window", f"is {config.window}", "llama.cpp heeds it in the model of 64 layers alone"
    if config.window is None and config.num_hidden_layers == 64:
        yield "sliding_window", "is null", "llama.cpp always has one in the model of 64 layers"


ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture(
            name="llama",
            families=("llama", "mistral", "ministral"),
            pairs=True,
            biases=_ALL,
            scalings=_STATIC | {"llama3", "longrope"},
        ),
        Architecture(name="qwen2", families=("qwen2",), square=True),
        Architecture(name="qwen3", families=("qwen3",)),
        Architecture(name="gemma", families=("gemma",), head="tied", activations=GELU),
        Architecture(
            name="gemma2",
            families=("gemma2",),
            head="tied",
            activations=GELU,
            windows=True,
            every=2,
            check=_gemma2,
        ),
        Architecture(
            name="gemma3",
            families=("gemma3_text",),
            activations=GELU,
            scalings=frozenset(("linear",)),
            windows=True,
            every=6,
            check=_gemma3,
        ),
        Architecture(name="phi3", families=("phi3",), square=True, scalings=frozenset(("longrope",))),
        Architecture(
            name="granite",
            families=("granite",),
            pairs=True,
            biases=_ALL,
            scalings=_STATIC | {"llama3", "longrope"},
        ),
        Architecture(name="smollm3", families=("smollm3",), pairs=True, check=_smollm3),
        Architecture(
            name="olmo2", families=("olmo2", "olmo3"), head="own", square=True, windows=True, every=4, check=_olmo
        ),
        Architecture(
            name="starcoder2",
            families=("starcoder2",),
            biases=_ALL - {"gate"},
            needed=frozenset(("o", "up", "down")),
            activations=GELU,
            square=True,
        ),
        Architecture(
            name="cohere2",
            families=("cohere2",),
            pairs=True,
            head="tied",
            square=True,
            windows=True,
            every=4,
            check=_cohere2,
        ),
        Architecture(name="command-r", families=("cohere",), pairs=True, head="tied", square=True),
        Architecture(name="stablelm", families=("stablelm",), head="own", square=True),
        Architecture(
            name="gptneox",
            families=("gpt_neox",),
            biases=frozenset(("qkv", "o", "up", "down")),
            needed=frozenset(("qkv", "o", "up", "down")),
            activations=GELU,
            head="own",
            square=True,
        ),
        Architecture(
            name="gpt2",
            families=("gpt2",),
            biases=frozenset(("qkv", "o", "up", "down")),
            activations=GELU,
            square=True,
        ),
        Architecture(
            name="arcee",
            families=("arcee",),
            pairs=True,
            activations=frozenset(("relu2",)),
            scalings=_STATIC | {"llama3"},
        ),
        Architecture(name="seed_oss", families=("seed_oss",), stems={"mlp_in": "post_attention_norm"}),
        Architecture(name="chatglm", families=("glm",), pairs=True, square=True),
        Architecture(name="glm4", families=("glm4",), pairs=True),
        Architecture(name="ernie4_5", families=("ernie4_5",), pairs=True),
        Architecture(
            name="exaone4",
            families=("exaone4",),
            square=True,
            scalings=_STATIC | {"llama3"},
            windows=True,
            every=4,
            check=_exaone4,
        ),
    )
}
"""`general.architecture` -> what llama.cpp computes under it."""

BY_FAMILY = {family: each for each in ARCHITECTURES.values() for family in each.families}


def architecture_of(config: DecoderConfig, file: Path) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture that computes this model, and notes on what it leaves out; a ConfigError where none does."""
    found = BY_FAMILY.get(config.model_type)
    if found is None:
        raise ConfigError(
            f"llama.cpp has no {config.model_type!r}",
            file=file,
            field="model_type",
            remedy=f"it has {', '.join(sorted(BY_FAMILY))}",
        )
    for name, message, remedy in _refused(found, config):
        raise ConfigError(message, file=file, field=name, remedy=remedy)
    return found, tuple(_notes(found, config))


def _refused(found: Architecture, config: DecoderConfig) -> Iterator[tuple[str, str, str]]:
    name = config.model_type
    surplus, lacking = config.biases - found.biases, found.needed - config.biases
    if surplus:
        yield "bias", f"is there in {', '.join(sorted(surplus))}", f"llama.cpp's {name} has none there"
    if lacking:
        yield "bias", f"is not there in {', '.join(sorted(lacking))}", f"llama.cpp's {name} needs it"
    if config.hidden_act not in found.activations:
        yield "hidden_act", f"is {config.hidden_act}", f"llama.cpp's {name} has {sorted(found.activations)[0]}"
    if found.head == "tied" and not config.tie_word_embeddings:
        yield "tie_word_embeddings", "is false", f"llama.cpp's {name} has no head but the embedding"
    if found.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        width = f"{config.num_attention_heads} heads of {config.head_dim}"
        yield "head_dim", f"makes {width}, hidden_size is {config.hidden_size}", f"llama.cpp's {name} needs them equal"
    if len({layer.scale for layer in config.layers}) > 1:
        yield "scale_attn_by_inverse_layer_idx", "is true", "llama.cpp has one factor for all layers"
    if name not in ("granite", "gemma2", "gemma3_text"):
        yield from _scale(config, config.head_dim**-0.5, "attention scale")
    for rope in dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None):
        kind = rope.rope_type
        if kind not in ("default", "dynamic") and kind not in found.scalings:
            yield "rope_type", f"is {kind}", f"llama.cpp's {name} knows {', '.join(sorted(found.scalings)) or 'none'}"
        if kind == "yarn" and ((rope.beta_fast or 32, rope.beta_slow or 1) != (32, 1) or rope.truncate is False):
            yield "rope_parameters", "sets yarn's beta_fast, beta_slow or truncate", "llama.cpp takes 32, 1 and true"
    yield from found.check(config)


def _notes(found: Architecture, config: DecoderConfig) -> Iterator[str]:
    if config.window is not None and not found.windows:
        yield (
            f"llama.cpp's {config.model_type} has no sliding window: past {config.window} tokens it attends to more "
            "than the model does"
        )
    if config.hidden_act == "gelu":
        yield "llama.cpp computes GELU by tanh, the model by erf: logits differ in the fourth digit"
    for rope in dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None):
        if rope.rope_type == "dynamic":
            yield (
                f"llama.cpp has no dynamic scaling: right up to {config.max_position_embeddings} tokens, which is the "
                "context_length that is written"
            )
        if rope.rope_type == "longrope":
            yield (
                f"llama.cpp takes the long factors in contexts of more than {rope.original_max_position_embeddings} "
                "tokens, however short the text; the model takes them from that length on"
            )

"""The metadata of a GGUF file as an HF `config.json`, for every architecture of `gguf_arch`.

Every key under the architecture's prefix is read, inert or an error. An architecture that computes several families
gives the plainest that has what the file says: a `llama` file with a window is a Mistral, one whose layers differ a
Ministral; an `olmo2` file with a window is an OLMo 3.
"""

from __future__ import annotations

from math import isclose
from typing import Any

from smedjan.checkpoint.gguf_arch import Architecture
from smedjan.checkpoint.gguf_file import GgufFile
from smedjan.checkpoint.gguf_rope import decimal, read_scaling
from smedjan.checkpoint.raw import PART
from smedjan.models.config import ConfigReader
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.fields import every_nth
from smedjan.models.registry import ARCHITECTURES, read_config
from smedjan.models.rope import RopeConfig, RopeKeys, write_rope, write_rope_of_each

_EPS = {
    **dict.fromkeys(("cohere", "cohere2", "stablelm", "gpt_neox"), "layer_norm_eps"),
    "starcoder2": "norm_epsilon",
    "gpt2": "layer_norm_epsilon",
}
_NO_HEAD_DIM = ("cohere2", "stablelm", "gpt_neox", "gpt2")
_ONE_WINDOW = ("mistral", "phi3", "starcoder2")
_OPTIONAL_WINDOW = ("qwen2", "qwen3", "smollm3")
_EACH_ROPE = ("gemma3_text", "olmo3")


def read_model_config(file: GgufFile, architecture: Architecture, ignore_keys: tuple[str, ...]) -> DecoderConfig:
    """The configuration, read once more through the family's strict reader: heads that contradict each other, token ids
    beyond the vocabulary."""
    prefix = f"{architecture.name}."
    data = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    reader = ConfigReader(data, file.path, [key.removeprefix(prefix) for key in ignore_keys], prefix=prefix)
    reader.inert("tensor_data_layout")
    reader.only("attention.causal", True, remedy="only causal attention is supported")
    for name in ("expert_count", "expert_used_count"):
        reader.only(name, 0, remedy="mixtures of experts are not supported")
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(data.get(name), list):
            if len(set(data[name])) != 1:
                raise reader.error("differs between layers", name, "only models with one value for all are supported")
            data[name] = data[name][0]
    layers = reader.integer("block_count", low=1)
    window, types = _window(reader, architecture, layers)
    family = _family(architecture, window, types)
    config = {"model_type": family, **_sizes(reader, file, family)}
    if window is not None:
        config.update(_window_keys(family, window, types))
    elif family in ("gemma3_text", "exaone4"):
        config.update(sliding_window=None, layer_types=["full_attention"] * layers)
    config.update(_rope(reader, file, family, config))
    norm = "rms_epsilon" if family not in _EPS else "epsilon"
    config[_EPS.get(family, "rms_norm_eps")] = decimal(reader.number(f"attention.layer_norm_{norm}", open_low=True))
    config["tie_word_embeddings"] = _tied(file, architecture)
    config.update(_biases(file, family))
    config.update(_factors(reader, file, family, config))
    config.update(token_ids(file))
    reader.finish()
    return read_config({key: value for key, value in config.items() if key not in _hidden(family)}, file.path)


def _hidden(family: str) -> tuple[str, ...]:
    """Keys that the family's config.json does not have."""
    if family == "gpt2":
        return ("head_dim", "num_key_value_heads", "intermediate_size")
    return ("head_dim",) if family in _NO_HEAD_DIM else ()


def _sizes(reader: ConfigReader, file: GgufFile, family: str) -> dict[str, Any]:
    hidden = reader.integer("embedding_length", low=1)
    heads = reader.integer("attention.head_count", low=1)
    head_dim = reader.integer("attention.key_length", hidden // heads, low=1)
    if reader.integer("attention.value_length", head_dim) != head_dim:
        raise reader.error(
            f"is {reader.data['attention.value_length']}, keys have {head_dim}",
            "attention.value_length",
            "only models whose values are as wide as keys are supported",
        )
    if family in _NO_HEAD_DIM and head_dim * heads != hidden:
        raise reader.error(
            f"is {head_dim}, {hidden} / {heads} is not", "attention.key_length", f"{family} has no other width of heads"
        )
    inner = reader.integer("feed_forward_length", low=1)
    return {
        "vocab_size": reader.integer("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())), low=1),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": reader.integer("block_count", low=1),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads, low=1),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("context_length", low=1),
        **({"n_inner": inner} if family == "gpt2" else {}),
    }


def _window(reader: ConfigReader, architecture: Architecture, layers: int) -> tuple[int | None, list[str] | None]:
    """(tokens, layer types): the types are None where nothing is said of single layers."""
    window = reader.optional_integer("attention.sliding_window") or None
    name = "attention.sliding_window_pattern"
    if isinstance(reader.data.get(name), list):
        local = reader.choices(name, (True, False), layers)
        assert local is not None
        types = ["sliding_attention" if each else "full_attention" for each in local]
        return window, types if window is not None else None
    every = reader.integer(name, architecture.every)
    if window is None or not architecture.windows:
        return window, None
    return window, every_nth(layers, every)


def _family(architecture: Architecture, window: int | None, types: list[str] | None) -> str:
    if architecture.name == "olmo2":
        return "olmo2" if window is None else "olmo3"
    if architecture.name == "llama" and window is not None:
        return "mistral" if types is None else "ministral"
    return architecture.families[0]


def _window_keys(family: str, window: int, types: list[str] | None) -> dict[str, Any]:
    if family in _ONE_WINDOW:
        return {"sliding_window": window}
    keys: dict[str, Any] = {"sliding_window": window}
    if types is not None:
        keys["layer_types"] = types
    if family in _OPTIONAL_WINDOW:
        keys["use_sliding_window"] = True
    if family in ("qwen2", "qwen3"):
        keys["max_window_layers"] = 0
    return keys


def _rope(reader: ConfigReader, file: GgufFile, family: str, config: dict[str, Any]) -> dict[str, Any]:
    if family == "gpt2":
        return {}
    head_dim, context = config["head_dim"], config["max_position_embeddings"]
    rotary = reader.integer("rope.dimension_count", head_dim, low=2)
    keys: RopeKeys = getattr(ARCHITECTURES[family], "KEYS", RopeKeys())
    if rotary != head_dim and (keys.partial is None or rotary > head_dim):
        raise reader.error(f"is {rotary}, heads have {head_dim}", "rope.dimension_count", "the two must be equal")
    rope = read_scaling(reader, file.tensors, head_dim=head_dim, rotary_dim=rotary, context=context, file=file.path)
    if family not in _EACH_ROPE:
        reader.inert("rope.freq_base_swa")
        written = write_rope(rope, keys)
        if rope.rope_type == "longrope" and keys.original is not None:
            written["original_max_position_embeddings"] = rope.original_max_position_embeddings
        return written
    default = 10000.0 if family == "gemma3_text" else rope.rope_theta
    theta = decimal(reader.number("rope.freq_base_swa", default, open_low=True))
    local = RopeConfig(rope_theta=theta)
    return write_rope_of_each({"full_attention": rope, "sliding_attention": local}, keys, ARCHITECTURES[family].LOCAL)


def _tied(file: GgufFile, architecture: Architecture) -> bool:
    """llama.cpp has no tied head for some architectures: the embedding stands there twice."""
    head, embedding = file.tensors.get("output.weight"), file.tensors.get("token_embd.weight")
    if head is None:
        return True
    if architecture.head != "own" or embedding is None or head.quantization != embedding.quantization:
        return False
    # Comparing views goes byte by byte in the interpreter, comparing copies of parts is memcmp.
    starts = range(0, head.data.nbytes, PART)
    return head.shape == embedding.shape and all(
        bytes(head.data[at : at + PART]) == bytes(embedding.data[at : at + PART]) for at in starts
    )


def _biases(file: GgufFile, family: str) -> dict[str, Any]:
    qkv = any(f"blk.0.{stem}.bias" in file.tensors for stem in ("attn_q", "attn_qkv"))
    mlp = "blk.0.ffn_down.bias" in file.tensors
    if family == "stablelm":
        return {"use_qkv_bias": qkv}
    if family == "starcoder2":
        return {"use_bias": mlp}
    if family == "seed_oss":
        return {"attention_bias": qkv, "attention_out_bias": "blk.0.attn_output.bias" in file.tensors, "mlp_bias": mlp}
    if family in ("llama", "granite", "smollm3", "arcee"):
        return {"attention_bias": qkv, "mlp_bias": mlp}
    if family in ("qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "glm", "glm4", "gpt_neox"):
        return {"attention_bias": qkv}
    return {}


def _factors(reader: ConfigReader, file: GgufFile, family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Multipliers, caps, and the order of a block's parts."""

    def number(name: str, default: float) -> float:
        # llama.cpp takes 0 for none.
        return decimal(reader.number(name, default)) or default

    head_dim, heads, layers = config["head_dim"], config["num_attention_heads"], config["num_hidden_layers"]
    if family == "granite":
        plain = head_dim**-0.5
        scale = number("attention.scale", plain)
        return {
            "attention_multiplier": plain if isclose(scale, plain, rel_tol=1e-7) else scale,
            "embedding_multiplier": number("embedding_scale", 1.0),
            "residual_multiplier": number("residual_scale", 1.0),
            "logits_scaling": number("logit_scale", 1.0),
        }
    if family in ("cohere", "cohere2"):
        return {"logit_scale": number("logit_scale", 1.0)}
    if family == "gemma2":
        return {
            "attn_logit_softcapping": number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": number("final_logit_softcapping", 30.0),
            "query_pre_attn_scalar": config["hidden_size"] // heads if layers == 46 else head_dim,
        }
    if family == "gemma3_text":
        return {
            "final_logit_softcapping": number("final_logit_softcapping", 0.0) or None,
            "query_pre_attn_scalar": config["hidden_size"] // heads if layers == 62 else head_dim,
        }
    if family == "gpt_neox":
        return {"use_parallel_residual": reader.flag("use_parallel_residual", True)}
    if family == "stablelm":
        reader.flag("use_parallel_residual", True)  # llama.cpp looks at the tensors, and so do we
        return {
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in file.tensors,
        }
    return {}


def token_ids(file: GgufFile) -> dict[str, Any]:
    """bos, eos (one, several or None) and pad, as config.json has them."""
    reader = ConfigReader(file.metadata, file.path)
    found = [reader.optional_integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(token for token in found if token is not None))
    return {
        "bos_token_id": reader.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": reader.optional_integer("tokenizer.ggml.padding_token_id"),
    }

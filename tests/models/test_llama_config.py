"""config.json is read as transformers reads it, or refused; nothing in it is dropped unread."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smedjan.errors import ConfigError
from smedjan.models import llama
from smedjan.models.config import RopeConfig, parse_json, write_rope
from smedjan.models.registry import read_config

FILE = Path("model/config.json")
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMOLLM2 = {
    **TINY,
    "architectures": ["LlamaForCausalLM"],
    "initializer_range": 0.04,
    "is_llama_config": True,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
}


def read(**changes: Any) -> llama.LlamaConfig:
    return read_config({**TINY, **changes}, FILE)


def test_defaults_are_transformers_own() -> None:
    ours, theirs = read_config({"model_type": "llama"}, FILE), HFConfig()
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    fields += ["num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"]
    fields += ["tie_word_embeddings", "attention_bias", "mlp_bias", "attention_dropout", "bos_token_id", "pad_token_id"]
    assert {name: getattr(ours, name) for name in fields} == {name: getattr(theirs, name) for name in fields}
    assert ours == llama.LlamaConfig()
    assert ours.eos_token_id == (theirs.eos_token_id,)
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("tied", "attention_bias", "mlp_bias", "head_dim"), itertools.product([0, 1], [0, 1], [0, 1], [None, 10])
)
def test_parameters_are_transformers_own_in_name_shape_and_order(
    tied: int, attention_bias: int, mlp_bias: int, head_dim: int | None
) -> None:
    changes = {
        "tie_word_embeddings": bool(tied),
        "attention_bias": bool(attention_bias),
        "mlp_bias": bool(mlp_bias),
        "head_dim": head_dim,
    }
    config = read(**changes)
    model = LlamaForCausalLM(HFConfig(**{**TINY, **changes}))
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(llama.parameter_shapes(config).items()) == expected
    assert llama.tied(config) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
        {"original_max_position_embeddings": 512, "rope_scaling": {k: v for k, v in LLAMA3.items() if "orig" not in k}},
    ],
)
def test_rope_is_read_as_transformers_reads_it_and_written_in_both_spellings(spelling: dict[str, Any]) -> None:
    """The inverse frequencies of transformers are the same from the original and from what we write, in either half."""
    config = read(**spelling)
    written = write_rope(config.rope)
    assert read(**written) == config
    expected = frequencies(spelling)
    old_half = {key: value for key, value in written.items() if key != "rope_parameters"}
    new_half = {"rope_parameters": written["rope_parameters"]}
    for half in (written, old_half, new_half):
        assert read(**half) == config
        assert torch.equal(frequencies(json.loads(json.dumps(half))), expected)


def frequencies(spelling: dict[str, Any]) -> torch.Tensor:
    return LlamaRotaryEmbedding(HFConfig(**copy.deepcopy({**TINY, **spelling}))).inv_freq


def test_what_we_write_is_the_same_model_to_us_and_to_transformers() -> None:
    config = read(**{**SMOLLM2, "head_dim": 10, "eos_token_id": [2, 5], "tie_word_embeddings": True})
    written = llama.write(config)
    assert read_config(written, FILE) == config
    theirs = HFConfig(**written)
    assert (theirs.head_dim, theirs.eos_token_id, theirs.tie_word_embeddings) == (10, [2, 5], True)
    assert read_config(json.loads(theirs.to_json_string()), FILE) == config


def test_real_configs_read_without_help() -> None:
    """SmolLM2's own, and every key that transformers writes."""
    assert read(**SMOLLM2).rope == RopeConfig(rope_theta=100000.0)
    assert read(**{**json.loads(HFConfig(**TINY).to_json_string()), "architectures": []}) == read()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt": ({"rope_thetta": 1.0}, "rope_thetta", "did you mean 'rope_theta'"),
    "unknown": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "--ignore-key attn_logit_softcapping"),
    "unknown in rope": (
        {"rope_scaling": {**LLAMA3, "betta": 1}},
        "rope_scaling.betta",
        "--ignore-key rope_scaling.betta",
    ),
    "architecture": ({"model_type": "lama"}, "model_type", "did you mean 'llama'"),
    "other architecture": ({"model_type": "qwen3"}, "model_type", "supported: llama"),
    "no architecture": ({"model_type": None}, "model_type", "supported: llama"),
    "not causal": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForCausalLM"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config", "unquantized"),
    "mlx-quantized": ({"quantization": {"bits": 4}}, "quantization", "unquantized"),
    "own code": ({"auto_map": {"AutoModel": "x.y"}}, "auto_map", "--ignore-key auto_map"),
    "text for int": ({"vocab_size": "64"}, "vocab_size", "whole number"),
    "true for int": ({"vocab_size": True}, "vocab_size", "whole number"),
    "float for int": ({"hidden_size": 24.0}, "hidden_size", "whole number"),
    "null for int": ({"hidden_size": None}, "hidden_size", "whole number"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
    "negative": ({"intermediate_size": -1}, "intermediate_size", "at least 1"),
    "int for bool": ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "finite"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta", "finite"),
    "eps zero": ({"rms_norm_eps": 0.0}, "rms_norm_eps", "above 0"),
    "bool for float": ({"rms_norm_eps": True}, "rms_norm_eps", "give a number"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "supported: silu"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout", "0.0"),
    "heads against width": ({"hidden_size": 26}, "hidden_size and num_attention_heads", "multiple"),
    "heads against groups": ({"num_key_value_heads": 3}, "num_attention_heads and num_key_value_heads", "divides"),
    "more groups than heads": ({"num_key_value_heads": 8}, "num_attention_heads and num_key_value_heads", "divides"),
    "odd head": ({"head_dim": 7}, "head_dim", "even"),
    "odd derived head": ({"hidden_size": 12}, "hidden_size / num_attention_heads", "even"),
    "pad beyond": ({"pad_token_id": 64}, "pad_token_id", "between 0 and 63"),
    "pad negative": ({"pad_token_id": -1}, "pad_token_id", "between 0 and 63"),
    "eos beyond": ({"eos_token_id": [2, 64]}, "eos_token_id", "between 0 and 63"),
    "eos text": ({"eos_token_id": ["</s>"]}, "eos_token_id", "between 0 and 63"),
    "rope type": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type", "default, linear, llama3"),
    "rope types": (
        {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
        "rope_scaling.rope_type and",
        "keep one",
    ),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "no default"),
    "rope thetas": (
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
        "rope_theta and rope_parameters",
        "keep",
    ),
    "rope spellings": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "rope_scaling.factor and rope_parameters.factor",
        "keep one",
    ),
    "rope bands": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling.low_freq_factor and", "larger"),
    "rope lengths": (
        {"original_max_position_embeddings": 4096, "rope_scaling": LLAMA3},
        "original_max_position_embeddings and rope_scaling",
        "keep one",
    ),
    "rope partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "whole head"),
    "rope partial inside": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial",
        "whole head",
    ),
    "rope text": ({"rope_scaling": "linear"}, "rope_scaling", "object"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved", "half-split"),
    "window": ({"sliding_window": 4096}, "sliding_window", "whole context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_config_is_one_line_with_file_field_and_remedy(case: str) -> None:
    changes, field, remedy = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert caught.value.file == str(FILE)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
    assert caught.value.remedy is not None
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_ignore_key_lets_an_unknown_key_pass_and_hides_no_other() -> None:
    data = {**TINY, "novelty": 1, "rope_scaling": {**LLAMA3, "betta": 1}, "auto_map": {}}
    ignored = ("novelty", "rope_scaling.betta", "auto_map")
    assert read_config(data, FILE, ignored) == read(rope_scaling=LLAMA3)
    for missing in ("novelty", "rope_scaling.betta", "auto_map"):
        with pytest.raises(ConfigError):
            read_config(data | {"auto_map": {"a": "b"}}, FILE, [key for key in ignored if key != missing])
    with pytest.raises(ConfigError, match="vocab_size"):
        read_config({**TINY, "vocab_size": -1}, FILE, ("vocab_size",))


def test_a_duplicate_key_is_not_dropped() -> None:
    with pytest.raises(ConfigError, match="vocab_size: the key 'vocab_size' stands there twice"):
        parse_json('{"vocab_size": 1, "vocab_size": 2}', FILE)

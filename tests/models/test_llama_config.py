"""Strict reading, told on a Llama: what is wrong in a config.json is one line with file, field and remedy.

What differs between families is in test_families_config.py, rotary positions are in test_rope_config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smedjan.errors import ConfigError
from smedjan.models.config import parse_json
from smedjan.models.decoder_config import DecoderConfig
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


def read(**changes: Any) -> DecoderConfig:
    return read_config({**TINY, **changes}, FILE)


@pytest.mark.parametrize(
    ("ids", "expected"), [(7, (7,)), ([2, 5], (2, 5)), ([], ()), (None, ())], ids=["one", "several", "none", "null"]
)
def test_stop_tokens(ids: Any, expected: tuple[int, ...]) -> None:
    config = read(eos_token_id=ids)
    assert config.eos_token_id == expected
    assert config.data["eos_token_id"] == ids


def test_tied() -> None:
    assert read().tied() == {}
    assert read(tie_word_embeddings=True).tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in read(tie_word_embeddings=True).parameter_shapes()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt": ({"rope_thetta": 1.0}, "rope_thetta", "did you mean 'rope_theta'"),
    "unknown": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "--ignore-key attn_logit_softcapping"),
    "unknown in rope": (
        {"rope_scaling": {**LLAMA3, "betta": 1}},
        "rope_scaling.betta",
        "--ignore-key rope_scaling.betta",
    ),
    "architecture": ({"model_type": "lama"}, "model_type", "did you mean 'llama'"),
    "other architecture": ({"model_type": "mamba"}, "model_type", "supported: arcee, cohere"),
    "no architecture": ({"model_type": None}, "model_type", "supported: arcee, cohere"),
    "not causal": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForCausalLM"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config", "unquantized"),
    "mlx-quantized": ({"quantization": {"bits": 4}}, "quantization", "unquantized"),
    "own code": ({"auto_map": {"AutoModel": "x.y"}}, "auto_map", "--ignore-key auto_map"),
    "text for int": ({"vocab_size": "64"}, "vocab_size", "whole number"),
    "true for int": ({"vocab_size": True}, "vocab_size", "whole number"),
    "float for int": ({"hidden_size": 24.0}, "hidden_size", "whole number"),
    "null for int": ({"hidden_size": None}, "hidden_size", "whole number"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers", "between 1 and"),
    "negative": ({"intermediate_size": -1}, "intermediate_size", "at least 1"),
    "int for bool": ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "finite"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta", "finite"),
    "eps zero": ({"rms_norm_eps": 0.0}, "rms_norm_eps", "above 0"),
    "bool for float": ({"rms_norm_eps": True}, "rms_norm_eps", "give a number"),
    "activation": ({"hidden_act": "gelu_fast"}, "hidden_act", "supported: gelu"),
    "dropout": ({"attention_dropout": 1.0}, "attention_dropout", "below 1"),
    "negative dropout": ({"attention_dropout": -0.1}, "attention_dropout", "at least 0"),
    "heads against width": ({"hidden_size": 26}, "hidden_size and num_attention_heads", "multiple"),
    "heads against groups": ({"num_key_value_heads": 3}, "num_attention_heads and num_key_value_heads", "divides"),
    "more groups than heads": ({"num_key_value_heads": 8}, "num_attention_heads and num_key_value_heads", "divides"),
    "odd head": ({"head_dim": 7}, "head_dim", "even"),
    "odd derived head": ({"hidden_size": 12}, "hidden_size / num_attention_heads", "even"),
    "pad beyond": ({"pad_token_id": 64}, "pad_token_id", "between 0 and 63"),
    "pad negative": ({"pad_token_id": -1}, "pad_token_id", "at least 0"),
    "eos negative": ({"eos_token_id": [2, -1]}, "eos_token_id", "between 0 and 63"),
    "eos text": ({"eos_token_id": ["</s>"]}, "eos_token_id", "between 0 and 63"),
    "rope type": (
        {"rope_scaling": {"type": "ntk", "factor": 2.0}},
        "rope_scaling.type",
        "default, dynamic, linear, llama3",
    ),
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

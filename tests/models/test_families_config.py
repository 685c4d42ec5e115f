"""config.json of every family: read as transformers reads it or refused, nothing dropped unread, written so that
transformers reads the same. Issue 4, What to build 2: the strict config reader."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from smedjan.errors import ConfigError
from smedjan.hf.export import complete_config
from smedjan.hf.families import TINY, changed
from smedjan.models.config import HF_INERT
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import ARCHITECTURES, read_config
from tests.families import ALL, CASES, make_model

FILE = Path("model/config.json")
REAL: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "real_configs.json").read_text())["configs"]
TESTER: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "hf" / "config_tester.json").read_text())[
    "families"
]
SETTINGS = [
    *(pytest.param(family, CASES[family][case], id=f"{family}-{case}") for family, case in ALL),
    *(pytest.param(family, settings, id=f"{family}-tester") for family, settings in TESTER.items()),
    *(pytest.param(family, {}, id=f"{family}-defaults") for family in ARCHITECTURES),
]


def theirs(family: str, settings: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **copy.deepcopy(settings))


def from_file(data: dict[str, Any]) -> PreTrainedConfig:
    """What transformers makes of a config.json."""
    return theirs(data["model_type"], {key: value for key, value in data.items() if key != "model_type"})


def as_json(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def read(data: dict[str, Any], **changes: Any) -> DecoderConfig:
    return read_config({**data, **changes}, FILE, ("auto_map",) if "auto_map" in data else ())


def computed(config: DecoderConfig) -> DecoderConfig:
    """Without what a file asks for in training: one that does not speak of dropout asks for none."""
    return replace(config, dropout={})


@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_what_transformers_writes_is_read_and_what_we_write_is_the_same_model(
    family: str, settings: dict[str, Any]
) -> None:
    peer = theirs(family, settings)
    config = read(as_json(peer))
    written = json.loads(json.dumps(complete_config(as_json(peer), FILE, "float32")))
    assert read(written) == config
    assert complete_config(written, FILE, "float32") == written
    again = from_file(written)
    assert list(changed(peer.to_dict(), again.to_dict())) == []
    assert read(as_json(again)) == config


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_defaults_are_transformers_own(family: str) -> None:
    """An empty config.json, and one in which transformers has spelt everything out."""
    assert computed(read({"model_type": family})) == computed(read(as_json(theirs(family, {}))))


def other(value: Any) -> Any:
    """A value of the same kind that says something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    if isinstance(value, float):
        return value * 1.5 + 0.05
    if isinstance(value, str):
        return "relu" if value != "relu" else "silu"
    if isinstance(value, list):
        return value[::-1] if value[::-1] != value else [*value, *value]
    return True if value is None else {}


HOW_TO_RUN = ("architectures", "dtype", "model_type", "return_dict", "transformers_version")
"""Not what is computed."""


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(4, 15)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_key_that_changes_nothing_for_us_changes_nothing_for_transformers(family: str) -> None:
    """Every key of transformers' own config.json, altered: refused, another model, or one of the same logits."""
    data = as_json(theirs(family, TINY[family]))
    config, model = read(data), make_model(family, TINY[family], attention="eager")
    expected, checked = logits(model), []
    for key, value in data.items():
        if key in HOW_TO_RUN:
            continue
        for new in (other(value), 3) if value is None else (other(value),):
            try:
                if read(data, **{key: new}) != config:
                    continue
                peer_config = from_file({**data, key: new})
            except (ConfigError, StrictDataclassError):
                continue
            peer = AutoModelForCausalLM.from_config(peer_config, dtype=torch.float32, attn_implementation="eager")
            peer.load_state_dict(model.state_dict())
            assert torch.equal(logits(peer.eval()), expected), f"{key} = {new!r} is read as if it did not matter"
            checked.append(key)
    assert "initializer_range" in checked
    assert len(checked) >= 2


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_unknown_key_is_refused_with_the_nearest_name(family: str) -> None:
    data = as_json(theirs(family, TINY[family]))
    with pytest.raises(ConfigError, match=r"vocab_sise: is not known.*did you mean 'vocab_size'"):
        read(data, vocab_sise=1)
    assert read_config({**data, "vocab_sise": 1}, FILE, ("vocab_sise",)) == read(data)


@pytest.mark.parametrize("name", REAL)
def test_configs_of_the_hub_read_as_transformers_reads_them(name: str) -> None:
    data = REAL[name]
    config, peer = read(data), from_file({key: value for key, value in data.items() if key != "auto_map"})
    assert computed(config) == computed(read(as_json(peer)))
    again = from_file(complete_config(data, FILE, "bfloat16", ("auto_map",) if "auto_map" in data else ()))
    assert computed(read(as_json(again))) == computed(config)
    assert list(changed(peer.to_dict(), again.to_dict())) == []


def test_the_first_name_of_longrope() -> None:
    """transformers 5 does not read Phi-3's first revision any more."""
    data = REAL["Phi-3-mini-128k-instruct"]
    su = {**data["rope_scaling"], "type": "su"}
    assert read(data, rope_scaling=su) == read(data)


def test_an_activation_that_we_do_not_compute_is_named() -> None:
    data = {key: value for key, value in REAL["pythia-70m"].items() if key != "hidden_act"}
    with pytest.raises(ConfigError, match="hidden_act: is 'gelu_fast'"):
        read(data, hidden_act="gelu_fast")


def test_every_family_has_a_config_of_the_hub() -> None:
    assert {data["model_type"] for data in REAL.values()} == set(ARCHITECTURES)


def test_code_in_the_repository_is_named() -> None:
    """Phi-3's config.json points to code, which we do not run: the one key that has to be let pass by hand."""
    with pytest.raises(ConfigError, match=r"auto_map: .*its own code.*--ignore-key auto_map"):
        read_config(REAL["Phi-3-mini-128k-instruct"], FILE)


ROPE = "rope_parameters"
YARN = {"rope_type": "yarn", "factor": 2.0}
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "two thetas": (
        "mistral",
        {"rope_theta": 1.0, ROPE: {"rope_type": "default", "rope_theta": 2.0}},
        "rope_theta and rope_parameters.rope_theta",
        "keep one",
    ),
    "two thetas under their own name": (
        "gpt_neox",
        {"rotary_emb_base": 1, ROPE: {"rope_type": "default", "rope_theta": 2.0}},
        "rotary_emb_base and rope_parameters.rope_theta",
        "keep one",
    ),
    "two partial factors": (
        "stablelm",
        {"partial_rotary_factor": 0.5, ROPE: {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor and rope_parameters.partial_rotary_factor",
        "keep one",
    ),
    "two scalings": (
        "qwen2",
        {"rope_scaling": YARN, ROPE: {**YARN, "factor": 4.0}},
        "rope_scaling.factor and rope_parameters.factor",
        "keep one",
    ),
    "two scalings of global layers": (
        "gemma3_text",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            ROPE: {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "rope_scaling.factor and rope_parameters.full_attention.factor",
        "keep one",
    ),
    "two local thetas": (
        "gemma3_text",
        {
            "rope_local_base_freq": 5.0,
            ROPE: {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "rope_local_base_freq and rope_parameters.sliding_attention.rope_theta",
        "keep one",
    ),
    "two original lengths": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            ROPE: {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 8,
            },
        },
        "original_max_position_embeddings and rope_parameters.original_max_position_embeddings",
        "keep one",
    ),
    "another number of factors": (
        "phi3",
        {ROPE: {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 3}},
        "rope_parameters.long_factor",
        "a list of 4",
    ),
    "two patterns": (
        "gemma3_text",
        {"sliding_window_pattern": 2, "layer_types": ["full_attention"] * 7},
        "sliding_window_pattern and layer_types",
        "keep one",
    ),
    "two patterns of another family": (
        "cohere2",
        {"sliding_window_pattern": 2, "layer_types": ["full_attention"] * 4},
        "sliding_window_pattern and layer_types",
        "keep one",
    ),
    "local layers without a window": (
        "gemma2",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
        "layer_types and sliding_window",
        "give the window",
    ),
    "local layers and no window used": (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False, "sliding_window": 4},
        "layer_types and sliding_window",
        "give the window",
    ),
    "a pattern of another length": ("olmo3", {"layer_types": ["full_attention"] * 3}, "layer_types", "a list of 4"),
    "a kind of layer that is unknown": ("ministral", {"layer_types": ["linear"] * 4}, "layer_types", "full_attention"),
    "layers of a family that has none": (
        "mistral",
        {"layer_types": ["full_attention"] * 4},
        "layer_types",
        "ministral",
    ),
    "a window of nothing": ("mistral", {"sliding_window": 0}, "sliding_window", "at least 1"),
    "layers without positions, of another number": (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "no_rope_layers",
        "list of 4",
    ),
    "two widths": ("gpt2", {"n_embd": 48, "hidden_size": 96}, "n_embd and hidden_size", "keep one"),
    "two depths": ("gpt2", {"n_layer": 4, "num_hidden_layers": 3}, "n_layer and num_hidden_layers", "keep one"),
    "two lengths": ("gpt2", {"n_ctx": 32}, "n_ctx", "n_positions is 64"),
    "heads that do not divide": ("gpt2", {"n_head": 7}, "n_embd and n_head", "multiple"),
    "heads and groups": ("qwen2", {"num_key_value_heads": 4}, "num_attention_heads and num_key_value_heads", "divides"),
    "groups of a family without": ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads", "remove it"),
    "heads and width": (
        "stablelm",
        {"num_attention_heads": 7, "num_key_value_heads": 7},
        "hidden_size and num",
        "multiple",
    ),
    "a head of another width": ("cohere2", {"head_dim": 16}, "head_dim", "8"),
    "heads that are not the width": ("helium", {"head_dim": 10}, "head_dim and hidden_size", "num_attention_heads"),
    "half a pair": ("gemma", {"head_dim": 7}, "head_dim", "even"),
    "half a pair of a part": ("stablelm", {"partial_rotary_factor": 0.4}, "partial_rotary_factor", "even"),
    "norms that we do not have": ("cohere2", {"use_qk_norm": True}, "use_qk_norm", "no such norms"),
    "norms over heads": ("cohere", {"use_qk_norm": True}, "use_qk_norm", "without norms"),
    "upcast scores": ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn", "dtype"),
    "another MLP": ("starcoder2", {"mlp_type": "gated"}, "mlp_type", "one kind"),
    "biases that transformers does not have": ("phi3", {"attention_bias": True}, "attention_bias", "no biases"),
    "both ways": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention", "causal"),
    "a pad beyond": ("olmo2", {"pad_token_id": 97}, "pad_token_id", "between 0 and 96"),
    "a dropout of everything": ("granite", {"attention_dropout": 1.0}, "attention_dropout", "below 1"),
    "an activation": ("seed_oss", {"hidden_act": "silo"}, "hidden_act", "did you mean 'silu'"),
    "another class": ("glm", {"architectures": ["GlmForTokenClassification"]}, "architectures", "GlmForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_contradiction_is_one_line_with_both_keys(case: str) -> None:
    family, changes, field, remedy = REFUSED[case]
    data = {"model_type": family, **copy.deepcopy(TINY[family])}
    assert read(data).model_type == family
    with pytest.raises(ConfigError) as caught:
        read(data, **changes)
    assert caught.value.file == str(FILE)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
    assert caught.value.remedy is not None
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_bookkeeping_is_sorted_and_named_once() -> None:
    assert sorted(set(HF_INERT)) == sorted(HF_INERT)

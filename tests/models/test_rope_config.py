"""Rotary positions in config.json: each kind, in either spelling and in both, gives transformers' frequencies.
Issue 4, What to build 2: "Both spellings of rope (`rope_theta`/`rope_scaling`, `rope_parameters`) in and out"."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smedjan.errors import ConfigError
from smedjan.hf.families import TINY
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import ARCHITECTURES, read_config
from smedjan.models.rope import RopeKeys
from tests.families import LONG, ROPES, SHORT

FILE = Path("model/config.json")
ROPE_KEYS = {
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq"),
}
OF_EACH = ("gemma3_text", "olmo3")
"""Families whose global and local layers have positions of their own."""
WITHOUT = ("gpt2",)
FAMILIES = tuple(family for family in ARCHITECTURES if family not in WITHOUT)
LLAMA3 = ROPES["llama3"]
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 5e5},
    "theta, no scaling": {"rope_theta": 5e5, "rope_scaling": None},
    "linear, older": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}},
    "linear, old": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear, both names": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    "linear, theta outside": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3, old": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3, new": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "llama3, the length outside": {
        "original_max_position_embeddings": 32,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if not key.startswith("original")},
    },
    "yarn, old": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn, everything": {"rope_parameters": {**ROPES["yarn-all"]}},
    "yarn, its attention_factor": {"rope_scaling": {**ROPES["yarn"], "attention_factor": 1.3}},
    "yarn, mscale alone": {"rope_scaling": {**ROPES["yarn"], "mscale": 1.0}},
    "longrope, old": {"rope_scaling": ROPES["longrope"]},
    "longrope, its attention_factor": {"rope_parameters": {**ROPES["longrope"], "attention_factor": 1.2}},
    "both": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
}


def tiny(family: str, **spelling: Any) -> dict[str, Any]:
    """A config.json of the family whose rotary positions are spelt like this, and by nothing else."""
    sizes = {key: value for key, value in TINY[family].items() if key not in ROPE_KEYS}
    return {"model_type": family, **copy.deepcopy({**sizes, **spelling})}


def computed(config: DecoderConfig) -> DecoderConfig:
    """Without what a file asks for in training: one that does not speak of dropout asks for none."""
    return replace(config, dropout={})


def read(data: dict[str, Any]) -> DecoderConfig:
    return read_config(data, FILE)


def frequencies(data: dict[str, Any]) -> dict[str, Any]:
    """Of every rotary module of transformers': the inverse frequencies and the factor of cos and sin."""
    made = copy.deepcopy(data)
    config = AutoConfig.for_model(made.pop("model_type"), **made)
    model = AutoModelForCausalLM.from_config(config)
    found: dict[str, Any] = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    for name, module in model.named_modules():
        found.update({f"{name}.{key}": value for key, value in vars(module).items() if "attention_scaling" in key})
    assert found
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, f"{name}: {value} is not {other[name]}"


def halves(config: DecoderConfig) -> list[dict[str, Any]]:
    """What we write, and the two halves of it that readers of either kind see."""
    written = json.loads(json.dumps(dict(config.data)))
    new = {key: value for key, value in written.items() if key not in ROPE_KEYS or key == "rope_parameters"}
    if "original_max_position_embeddings" in written:
        new["original_max_position_embeddings"] = written["original_max_position_embeddings"]
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    return [written, new, old]


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_kind_is_transformers_own_and_written_in_both_spellings(name: str) -> None:
    data = tiny("llama", **SPELLINGS[name])
    config, expected = read(data), frequencies(data)
    for half in halves(config):
        assert computed(read(half)) == computed(config)
        assert_same(frequencies(half), expected)


@pytest.mark.parametrize("kind", ["default", *(kind for kind in ROPES if kind != "yarn-all")])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OF_EACH])
def test_each_family_has_each_kind(family: str, kind: str) -> None:
    """Refused where transformers' own class refuses it (Phi-3 has longrope alone)."""
    keys = getattr(ARCHITECTURES[family], "KEYS", RopeKeys())
    table = {"rope_theta": 5e4, **ROPES.get(kind, {"rope_type": "default"})}
    outside = {}
    if keys.partial is not None:
        table["partial_rotary_factor"] = 0.5
    if keys.original is not None and "original_max_position_embeddings" in table:
        # Where a family has the length outside, transformers takes that one, given or not.
        outside["original_max_position_embeddings"] = table["original_max_position_embeddings"]
    if kind == "longrope":
        plain = {"rope_type": "default", "partial_rotary_factor": table.get("partial_rotary_factor", 1.0)}
        config = read(tiny(family, rope_parameters=plain))
        pairs = next(layer.rope for layer in config.layers if layer.rope).rotary_dim(config.head_dim) // 2
        table.update(short_factor=[1.0 + 0.1 * i for i in range(pairs)], long_factor=[2.0 + i for i in range(pairs)])
    data = tiny(family, rope_parameters=table, **outside)
    if kind not in keys.types:
        with pytest.raises(ConfigError, match=r"rope_parameters\.rope_type"):
            read(data)
        return
    config, expected = read(data), frequencies(data)
    assert {layer.rope.rope_type for layer in config.layers if layer.rope} == {kind}
    for half in halves(config):
        assert computed(read(half)) == computed(config)
        assert_same(frequencies(half), expected)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", OF_EACH)
def test_global_and_local_positions(family: str, kind: str) -> None:
    local = {"rope_type": "default", "rope_theta": 1e4 if family == "gemma3_text" else 5e5}
    table = {"rope_theta": 2e6, **ROPES.get(kind, {"rope_type": "default"})}
    data = tiny(family, rope_parameters={"full_attention": table, "sliding_attention": local})
    config = read(data)
    ropes = {layer.window is None: layer.rope for layer in config.layers}
    assert (ropes[True].rope_type, ropes[False].rope_type) == (kind, "default")
    assert (ropes[True].rope_theta, ropes[False].rope_theta) == (2e6, local["rope_theta"])
    expected = frequencies(data)
    for half in halves(config):
        assert computed(read(half)) == computed(config)
        assert_same(frequencies(half), expected)


def test_the_older_spelling_is_left_out_where_it_cannot_say_it() -> None:
    """Olmo 3 has no key for local layers' theta: one that is not the default stands in the new table alone."""
    both = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    config = read(tiny("olmo3", rope_parameters=both))
    assert {layer.rope.rope_theta for layer in config.layers} == {1e4}
    assert "rope_scaling" not in config.data
    assert read(dict(config.data)) == config


def test_partial_rotation_under_each_name() -> None:
    for family, key in (
        ("gpt_neox", "rotary_pct"),
        ("stablelm", "partial_rotary_factor"),
        ("glm", "partial_rotary_factor"),
    ):
        for spelling in ({key: 0.5}, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}):
            data = tiny(family, **spelling)
            config = read(data)
            assert {layer.rope.partial_rotary_factor for layer in config.layers} == {0.5}
            assert config.data[key] == config.data["rope_parameters"]["partial_rotary_factor"] == 0.5
            assert_same(frequencies(dict(config.data)), frequencies(data))


def test_phi3_counts_from_its_original_length() -> None:
    data = tiny("phi3", rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG})
    data |= {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    config = read(data)
    assert config.layers[0].rope.factor == 4.0
    assert config.restart_after == 16
    assert_same(frequencies(dict(config.data)), frequencies(data))


def test_no_positions_of_this_kind() -> None:
    assert all(layer.rope is None for layer in read({"model_type": "gpt2"}).layers)
    with pytest.raises(ConfigError, match="rope_theta: is not known"):
        read({"model_type": "gpt2", "rope_theta": 1.0})

"""There and home again: what transformers saved is imported, saved by us, and is the same model to its loaders.

Bits where the peer is transformers; where it is mlx-lm, the bound of tests/tolerances.py, against float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import smedjan
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.hf.import_model import import_model
from tests.conftest import VOCAB, assert_bits
from tests.families import ALL, BASE, CASES, ROPES, make_model
from tests.hf.damage import WEIGHTS, put, put_json
from tests.tolerances import assert_near

IDS = torch.randint(4, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
"""Longer than each window and each original length of scaled positions."""
SHARD = "60KB"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(directory: Path, dtype: str = "float32") -> PreTrainedModel:
    """transformers' model, with no key missing, left over, or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=dtype
    )
    assert not any(info.values()), info
    return model.eval()


def ours(directory: Path) -> torch.Tensor:
    model = smedjan.load(directory, backend="torch_reference", attention="eager")
    return torch.from_numpy(model.logits(IDS.numpy()))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def contents(directory: Path) -> dict[str, bytes]:
    return {name: bytes(tensor.data) for name, tensor in open_checkpoint(directory).items()}


FIRST = [(family, next(iter(cases))) for family, cases in CASES.items()]


@pytest.mark.parametrize(
    ("family", "case", "dtype"),
    [*((*each, "float32") for each in ALL), *((*each, "bfloat16") for each in FIRST)],
)
def test_transformers_to_us_to_transformers(family: str, case: str, dtype: str, tmp_path: Path) -> None:
    """Imported in shards, loaded, saved, imported again: at each station the same model, at the end to transformers."""
    source = make_model(family, CASES[family][case], dtype=dtype, attention="eager")
    expected = logits(source)
    source.save_pretrained(tmp_path / "source")
    report = import_model(tmp_path / "source", tmp_path / "imported", max_shard_size=SHARD)
    assert report.dtype == dtype
    assert report.parameters == sum(parameter.numel() for parameter in source.parameters())
    assert len(list((tmp_path / "imported").glob("model-*.safetensors"))) > 1 or dtype == "bfloat16"
    assert_bits(ours(tmp_path / "imported"), expected.float(), "ours")
    smedjan.load(tmp_path / "imported", backend="torch_reference", attention="eager").save(tmp_path / "saved")
    import_model(tmp_path / "saved", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "saved") == config_of(tmp_path / "imported")
    assert contents(tmp_path / "again") == contents(tmp_path / "saved") == contents(tmp_path / "imported")
    assert_bits(logits(load(tmp_path / "again", dtype)), expected, "transformers, at home")


@pytest.mark.parametrize(("family", "case"), FIRST)
def test_float32_becomes_the_bfloat16_of_transformers(family: str, case: str, tmp_path: Path) -> None:
    make_model(family, CASES[family][case], attention="eager").save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "out", dtype="bfloat16", max_shard_size=SHARD)
    expected = logits(load(tmp_path / "source", "bfloat16"))
    assert_bits(logits(load(tmp_path / "out", "bfloat16")), expected, "bfloat16")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


# spellings

ROPED = [
    *((("llama"), f"rope-{kind}") for kind in ROPES),
    ("qwen2", "tied-yarn"),
    ("phi3", "longrope"),
    ("phi3", "partial"),
    ("gemma3_text", "scaled-global"),
    ("olmo3", "scaled-global"),
    ("stablelm", "head-norms"),
    ("gpt_neox", "sequential"),
    ("glm", "plain"),
]


@pytest.mark.parametrize(("family", "case"), ROPED)
def test_each_spelling_of_rope_alone_is_the_same_model(family: str, case: str, tmp_path: Path) -> None:
    """What we write without `rope_parameters`, and without all the rest, is the model that both together are; and
    transformers reads the older spelling as we do."""
    source = make_model(family, CASES[family][case], attention="eager")
    expected = logits(source)
    source.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "out")
    both = config_of(tmp_path / "out")
    new = config_of(tmp_path / "source")
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert "rope_parameters" in new
    assert not {"rope_theta", "rope_scaling", "rotary_emb_base"} & set(new)
    assert {"rope_theta", "rotary_emb_base"} & set(old)
    for name, config in (("new", new), ("old", old | {"transformers_version": "4.46.0"}), ("both", both)):
        put_json(tmp_path / "out" / "config.json", config)
        assert_bits(ours(tmp_path / "out"), expected, name)
        assert_bits(logits(load(tmp_path / "out")), expected, f"transformers, {name}")
        import_model(tmp_path / "out", tmp_path / name)
        written = config_of(tmp_path / name)
        assert {**written, "transformers_version": ""} == {**both, "transformers_version": ""}, name


# older names


def edited(directory: Path, change: Any) -> None:
    state = safetensors.torch.load_file(directory / WEIGHTS)
    content = safetensors.torch.save(change(state), metadata={"format": "pt"})
    put(directory / WEIGHTS, content)


def mask(size: int = 64) -> torch.Tensor:
    return torch.ones(size, size).tril().reshape(1, 1, size, size)


OLDER = {
    "gpt2, without its prefix, with masks": (
        "gpt2",
        lambda state: (
            {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
            | {f"h.{layer}.attn.bias": mask() for layer in range(3)}
            | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
        ),
    ),
    "gpt2, with masks": (
        "gpt2",
        lambda state: state | {f"transformer.h.{layer}.attn.bias": mask() for layer in range(3)},
    ),
    "gpt2, with its tied head": (
        "gpt2",
        lambda state: state | {"lm_head.weight": state["transformer.wte.weight"].clone()},
    ),
    "gpt_neox, with masks and frequencies": (
        "gpt_neox",
        lambda state: (
            state
            | {f"gpt_neox.layers.{layer}.attention.bias": mask() for layer in range(4)}
            | {f"gpt_neox.layers.{layer}.attention.masked_bias": torch.tensor(-1e9) for layer in range(4)}
            | {f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": torch.ones(1) for layer in range(4)}
        ),
    ),
    "gpt_neox, the head by its newer name": (
        "gpt_neox",
        lambda state: {name.replace("embed_out", "lm_head"): tensor for name, tensor in state.items()},
    ),
    "llama, with frequencies": (
        "llama",
        lambda state: (
            state | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
        ),
    ),
}


@pytest.mark.parametrize("case", OLDER)
def test_older_checkpoints_come_home_under_today_s_names(case: str, tmp_path: Path) -> None:
    family, change = OLDER[case]
    source = make_model(family, next(iter(CASES[family].values())), attention="eager")
    source.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "plain")
    edited(tmp_path / "source", change)
    import_model(tmp_path / "source", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert_bits(ours(tmp_path / "out"), logits(source), "ours")
    assert_bits(logits(load(tmp_path / "out")), logits(source), "transformers")


# mlx-lm

WIDE = {"hidden_size": 64, "num_attention_heads": 8}
GPT_NEOX = {"intermediate_size": 4 * 48, "hidden_act": "gelu_new"}
YARN_ALL = {key: value for key, value in ROPES["yarn-all"].items() if key != "truncate"}
MLX: dict[tuple[str, str], dict[str, Any]] = {
    ("gemma2", "sqrt(H) is 8, window not reached"): {**CASES["gemma2"]["plain"], **WIDE, "sliding_window": 32},
    ("gemma3_text", "sqrt(H) is 8"): {**CASES["gemma3_text"]["plain"], **WIDE},
    ("gemma3_text", "sqrt(H) is 8, each second layer"): {**CASES["gemma3_text"]["scaled-global"], **WIDE},
    ("gpt_neox", "I is 4 H, GELU by tanh"): {**CASES["gpt_neox"]["parallel"], **GPT_NEOX},
    ("llama", "yarn, rounded ends"): {**BASE, "rope_parameters": {"rope_theta": 1e4, **YARN_ALL}},
    ("llama", "longrope, derived factor"): {
        **BASE,
        "rope_parameters": {"rope_theta": 1e4, **ROPES["longrope"], "factor": 64 / 12},
    },
    ("starcoder2", "exact GELU"): {**BASE, "hidden_act": "gelu"},
}
"""What mlx-lm has right of the families in WRONG: the reasons given there are the reasons."""

WINDOW, BIASES, ABSENT = "no sliding window", "no biases", "no such model_type"
ROOT = "sqrt(H) is rounded to bfloat16 in a float32 model too"
GPT2 = "tensors without the prefix `transformer.`, and I = 4 H, alone"
WRONG: dict[tuple[str, str], str] = {
    ("llama", "rope-yarn-all"): "yarn's `truncate` is always true",
    ("llama", "rope-longrope"): "longrope's `factor` is not read, but derived from the lengths",
    ("mistral", "window"): WINDOW,
    ("mistral", "odd-heads"): WINDOW,
    ("ministral", "alternating"): ABSENT,
    ("ministral", "all-local"): ABSENT,
    ("qwen2", "window"): WINDOW,
    ("qwen3", "window-biases"): BIASES,
    ("gemma", "plain"): "exact GELU alone",
    ("gemma", "untied-biases"): BIASES,
    ("gemma2", "plain"): f"{WINDOW}, and {ROOT}",
    ("gemma2", "tight-caps"): f"{WINDOW}, and {ROOT}",
    ("gemma2", "no-caps"): "a softcap that is null is divided by",
    ("gemma3_text", "plain"): ROOT,
    ("gemma3_text", "cap-biases"): BIASES,
    ("gemma3_text", "scaled-global"): ROOT,
    ("phi3", "window"): WINDOW,
    ("starcoder2", "plain"): "exact GELU alone",
    ("starcoder2", "no-biases-window"): "biases alone",
    ("gpt_neox", "parallel"): "I = 4 H alone",
    ("gpt_neox", "sequential"): "biases alone",
    ("gpt_neox", "odd-heads-tied"): "no tied head",
    ("gpt2", "plain"): GPT2,
    ("gpt2", "by-layer"): GPT2,
    ("gpt2", "untied-unscaled"): GPT2,
    ("arcee", "plain"): ABSENT,
    ("arcee", "biases"): ABSENT,
    ("glm", "plain"): "whole heads are turned, whatever partial_rotary_factor says",
    ("vaultgemma", "plain"): ABSENT,
    ("exaone4", "plain"): "the pattern of layers as text (`LLLG`) alone",
}
"""(family, case) -> what mlx-lm 0.32.2 lacks, or has alone. The tests above hold us to the bits of transformers."""


def mlx_logits(directory: Path) -> torch.Tensor:
    model, _ = load_model(directory, strict=True)
    return torch.from_numpy(np.array(model(mx.array(IDS.numpy()))))


CHECKED = {**{(family, case): CASES[family][case] for family, case in ALL}, **MLX}


@pytest.mark.parametrize(("family", "case"), [each for each in CHECKED if each not in WRONG])
def test_mlx_lm_loads_what_we_write(family: str, case: str, tmp_path: Path) -> None:
    source = make_model(family, CHECKED[family, case], attention="eager")
    source.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "out", max_shard_size=SHARD)
    plain = logits(source)
    assert_near(f"{family}, {case}", mlx_logits(tmp_path / "out"), logits(source.double()), plain)


@pytest.mark.parametrize(("family", "case"), WRONG)
def test_what_mlx_lm_has_otherwise_is_still_so(family: str, case: str, tmp_path: Path) -> None:
    """It refuses the model, or its logits are far outside the bound: else the table says too much."""
    source = make_model(family, CASES[family][case], attention="eager")
    source.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "out")
    expected = logits(source)
    with pytest.raises((ValueError, TypeError, AssertionError)):
        assert_bounded(mlx_logits(tmp_path / "out"), expected)


def assert_bounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm()) < 2**-16 * float(expected.norm())


# mlx-lm, of what transformers 5 saved, which has `rope_parameters` alone

THETA, SCALING, PARTIAL = "rope_theta", "rope_scaling", "partial_rotary_factor"
DROPPED: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "rope-linear"): {SCALING: None},
    ("llama", "rope-dynamic"): {SCALING: None},
    ("llama", "rope-llama3"): {SCALING: None},
    ("llama", "rope-yarn"): {SCALING: None},
    ("llama", "yarn, rounded ends"): {THETA: 10000.0, SCALING: None},
    ("llama", "longrope, derived factor"): {SCALING: None},
    ("qwen2", "plain"): {THETA: 1000000.0},
    ("qwen2", "tied-yarn"): {SCALING: None},
    ("phi3", "longrope"): {SCALING: None},
    ("smollm3", "plain"): {THETA: 10000.0},
    ("smollm3", "window"): {THETA: 10000.0},
    ("smollm3", "biases-untied"): {THETA: 10000.0},
    ("starcoder2", "exact GELU"): {THETA: 100000.0},
    ("cohere2", "plain"): {THETA: 50000.0},
    ("cohere", "plain"): {THETA: 8000000.0},
}
"""What mlx-lm 0.32.2 computes with in silence: the keys that it reads, and the values that it has where they are not
there. SmolLM 3's base of 2,000,000 becomes 10,000, and its logits are a sixth off."""
ASKED: dict[tuple[str, str], tuple[str, ...]] = {
    ("granite", "multipliers"): (THETA,),
    ("olmo3", "plain"): (THETA,),
    ("olmo3", "scaled-global"): (THETA, SCALING),
    ("stablelm", "plain"): (THETA, PARTIAL),
    ("gpt_neox", "I is 4 H, GELU by tanh"): ("rotary_emb_base", "rotary_pct"),
    ("glm4", "plain"): (THETA, PARTIAL),
    ("helium", "plain"): (THETA,),
    ("ernie4_5", "plain"): (THETA,),
    ("exaone4", "no-window"): (THETA, SCALING),
}
"""The keys without which it refuses the model."""


def one_each(cases: list[tuple[str, str]]) -> list[Any]:
    """The first of each family; the others are slow."""
    first = dict(reversed(cases))
    return [pytest.param(*each, marks=() if first[each[0]] == each[1] else pytest.mark.slow) for each in cases]


@pytest.mark.parametrize(("family", "case"), one_each([*DROPPED, *ASKED]))
def test_what_mlx_lm_drops_of_what_transformers_saved(family: str, case: str, tmp_path: Path) -> None:
    """We have the bits of transformers, mlx-lm another model or none. The keys named alone put it right."""
    source = make_model(family, CHECKED[family, case], attention="eager")
    source.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "out")
    expected, wide = logits(source), logits(source.double())
    assert_bits(ours(tmp_path / "source"), expected, "ours")
    raw, written = config_of(tmp_path / "source"), config_of(tmp_path / "out")
    keys = DROPPED.get((family, case)) or ASKED[family, case]
    assert not set(keys) & set(raw)
    if (family, case) in DROPPED:
        found = mlx_logits(tmp_path / "source")
        with pytest.raises(AssertionError):
            assert_bounded(found, expected)
        put_json(tmp_path / "source" / "config.json", {**raw, **DROPPED[family, case]})
        assert torch.equal(mlx_logits(tmp_path / "source"), found), "these are the values that it took"
    else:
        with pytest.raises(TypeError, match=keys[0]):
            mlx_logits(tmp_path / "source")
    put_json(tmp_path / "source" / "config.json", {**raw, **{key: written[key] for key in keys}})
    assert_near(f"{family}, {case}", mlx_logits(tmp_path / "source"), wide, expected)

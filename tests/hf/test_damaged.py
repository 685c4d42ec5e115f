"""Every key of config.json removed, and every value replaced by one that cannot be: refused by name, or harmless.

What no reader can see is left out: a number that is another valid one (a window of 5 for 4) makes another sound model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from smedjan.hf.import_model import import_model
from tests.families import BASE, CASES
from tests.hf.damage import Damage, check, make_source, put_json, remove

Path_ = tuple[str, ...]

OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")
"""Of yarn, and attention_factor of longrope: even a complete file may lack them, so that the report must tell."""

NULL = (*OPTIONAL, "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Where null is a sound value: none, or the default."""


def _leaves(config: dict[str, Any], where: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for key, value in config.items():
        yield (*where, key), value
        if isinstance(value, dict):
            yield from _leaves(value, (*where, key))


def _damaged_values(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield from (("made a number", int(value)), ("made a string", str(value)), ("null", None))
    elif isinstance(value, int | float):
        yield from (("negated", -value), ("zeroed", type(value)(0)), ("made a string", str(value)), ("null", None))
        yield ("huge", 10**30 if isinstance(value, int) else 1e300)
        yield ("infinite", float("inf"))
        yield ("made a float", float(value) if isinstance(value, int) else value)
    elif isinstance(value, str):
        yield from (("misspelt", value + "x"), ("made a number", 7), ("null", None))
    elif isinstance(value, list):
        yield from (("truncated", value[:-1]), ("made a string", str(value)), ("emptied", []))
        yield ("with a number as string", [str(value[0]), *value[1:]] if value else ["x"])
    elif isinstance(value, dict):
        yield from (("emptied", {}), ("made a list", [value]), ("made a string", "x"))


def _set(where: Path_, value: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        config = deepcopy(json.loads((directory / "config.json").read_text()))
        inner = config
        for key in where[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[where[-1]]
        else:
            inner[where[-1]] = value
        put_json(directory / "config.json", config)

    return apply


def config_damages(source: Path, label: str, *, older: bool = False) -> list[Damage]:
    """Each key removed, and each value replaced by what it cannot be."""
    made: list[Damage] = []
    for where, value in _leaves(json.loads((source / "config.json").read_text())):
        key = where[-1]
        changes: list[tuple[str, Any]] = [("removed", ...), *_damaged_values(value)]
        for what, new in changes:
            if new is None and key in NULL:
                continue
            made.append(
                Damage(
                    what=f"{label}: {'.'.join(where)} {what}",
                    file="config.json",
                    names=(key,),
                    apply=_set(where, new),
                    said=(what == "removed" or new is None) and (older or key in OPTIONAL),
                    weighed=new is None or (older and what == "removed"),
                )
            )
    return made


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "attention_factor": 1.3,
    "beta_fast": 12.0,
    "beta_slow": 3.0,
    "truncate": False,
}
MSCALE = {key: value for key, value in YARN.items() if key != "attention_factor"} | {
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
}
ODD_DEFAULTS = {"rms_norm_eps": 1e-2, "max_position_embeddings": 16384, "hidden_act": "gelu", "attention_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3": ("llama", CASES["llama"]["rope-llama3"] | {"rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    "llama, yarn": ("llama", {**BASE, **ODD_DEFAULTS, "rope_parameters": YARN}),
    "llama, yarn, mscale": ("llama", {**BASE, **ODD_DEFAULTS, "rope_parameters": MSCALE}),
    "gemma3_text": (
        "gemma3_text",
        CASES["gemma3_text"]["scaled-global"] | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    ),
    "gpt2": (
        "gpt2",
        CASES["gpt2"]["by-layer"] | {"n_inner": 80, "layer_norm_epsilon": 1e-2, "activation_function": "relu"},
    ),
    "gpt_neox": ("gpt_neox", CASES["gpt_neox"]["sequential"] | {"layer_norm_eps": 1e-2}),
    "phi3, longrope": ("phi3", CASES["phi3"]["longrope"] | {"sliding_window": 4}),
    "stablelm": ("stablelm", CASES["stablelm"]["head-norms"]),
    "qwen2": ("qwen2", CASES["qwen2"]["window"]),
    "granite": ("granite", CASES["granite"]["multipliers"]),
}
"""One of each way to lay out weights and positions, with values that are not the family's defaults."""

OLDER = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq")


@pytest.mark.parametrize("model", MODELS)
def test_each_key_of_config(model: str, tmp_path: Path) -> None:
    family, settings = MODELS[model]
    source = make_source(tmp_path / "source", family, settings)
    damages = config_damages(source, model)
    assert len(damages) > 120
    check(source, damages, tmp_path / "scratch")


@pytest.mark.parametrize("model", ["llama, llama3", "gemma3_text", "gpt_neox", "phi3, longrope"])
def test_each_key_of_an_older_config(model: str, tmp_path: Path) -> None:
    """Positions in the older spelling. A key gone is a key that its transformers did not know: the report must tell."""
    family, settings = MODELS[model]
    source = make_source(tmp_path / "source", family, settings)
    to_older(source)
    damages = config_damages(source, model, older=True)
    assert {damage.names[0] for damage in damages} & set(OLDER)
    check(source, damages, tmp_path / "scratch")


def to_older(source: Path) -> None:
    """config.json as transformers 4 wrote it."""
    import_model(source, source / "spelt")
    config = json.loads((source / "spelt" / "config.json").read_text())
    remove(source / "spelt")
    del config["rope_parameters"]
    put_json(source / "config.json", config | {"transformers_version": "4.46.0"})

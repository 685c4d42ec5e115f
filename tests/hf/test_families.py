"""Every family is transformers' to the bit: logits, loss, every gradient, prefill and decoding, in float32 and in
bfloat16, in each attention that transformers has for it, unpadded and padded on either side.
Issue 4, Shows: "`parity` on tiny random models of every family, several configs each ... and those of transformers' own
model tests".

The text has 11 tokens, 15 with those decoded after it: windows of 4 are well behind, and so are the 12 tokens after
which dynamic and longrope positions change. Where they do, a text of 15 begins behind that point."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smedjan.models.registry import ARCHITECTURES, read_config
from tests.conftest import make_batch
from tests.families import ALL, ATTENTIONS, CASES, PADDINGS, REFUSES, attentions, compare, make_model, make_session_of

TESTER = json.loads((Path(__file__).parent / "config_tester.json").read_text())
CONFIG_TESTER: dict[str, dict[str, Any]] = TESTER["families"]
DTYPES = ("float32", "bfloat16")
SWITCHING = [pair for pair in ALL if any(kind in pair[1] for kind in ("dynamic", "longrope"))]
"""Cases whose frequencies hang on the length of the text: 12 tokens."""


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Hundreds of graphs come and go: looking through torch's own objects each time is a fifth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def every(pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(family, case, attention) for family, case in pairs for attention in attentions(family)]


def compare_all(family: str, settings: dict[str, Any], dtype: str, attention: str, *, seq: int = 11) -> None:
    """Each padding has a model of its own: transformers' dynamic positions keep the longest text that they saw."""
    session = None
    for padding in PADDINGS:
        model = make_model(family, settings, dtype=dtype, attention=attention)
        session = session or make_session_of(model, attention=attention)
        compare(session, model, make_batch(padding, seq=seq))


def test_there_are_cases_of_every_family() -> None:
    assert set(CASES) == set(CONFIG_TESTER) == set(ARCHITECTURES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "case", "attention"), every(ALL), ids=lambda value: value)
def test_equal_to_the_bit(family: str, case: str, attention: str, dtype: str) -> None:
    compare_all(family, CASES[family][case], dtype, attention)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "case", "attention"), every(SWITCHING), ids=lambda value: value)
def test_equal_to_the_bit_where_the_text_begins_behind_the_switch(
    family: str, case: str, attention: str, dtype: str
) -> None:
    compare_all(family, CASES[family][case], dtype, attention, seq=15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CONFIG_TESTER)
def test_equal_to_the_bit_on_the_models_of_transformers_own_tests(family: str, dtype: str) -> None:
    for attention in attentions(family):
        compare_all(family, CONFIG_TESTER[family], dtype, attention)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param(family, CASES[family][case], id=f"{family}-{case}") for family, case in ALL),
        *(pytest.param(family, settings, id=f"{family}-tester") for family, settings in CONFIG_TESTER.items()),
    ],
)
def test_parameters_have_transformers_names_shapes_and_order(family: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = read_config({**config.to_dict(), "architectures": None}, Path("config.json"))
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(ours.parameter_shapes().items()) == expected
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert set(ours.tied()) == everything - {name for name, _ in expected}


REASONS = {
    "eager": None,
    "sdpa": "does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention",
    "flash_attention_2": "the package for FlashAttention2 doesn't seem to be installed",
    "flash_attention_3": "the package for FlashAttention3 doesn't seem to be installed",
    "flash_attention_4": "the package for FlashAttention4 doesn't seem to be installed",
    "flex_attention": "FlexAttention does not support backward on CPU",
    "paged|eager": "was called without a paged attention cache",
}
"""Every attention that transformers knows, and what it says where it does not compute it here."""


def refusal(family: str, attention: str) -> str | None:
    """transformers' own words, or None where it computes and differentiates this."""
    ids = torch.tensor([[5, 6, 7]])
    try:
        model = make_model(family, next(iter(CASES[family].values())), attention=attention)
        with torch.compiler.set_stance("force_eager"):  # flex_attention would be compiled first, for 12 seconds
            model(input_ids=ids, labels=ids).loss.backward()
    except (ValueError, ImportError, NotImplementedError) as cause:
        return str(cause)
    return None


@pytest.mark.parametrize("family", CASES)
def test_what_transformers_refuses_is_listed(family: str) -> None:
    """sdpa and eager are compared above wherever it computes them; what it does not is listed with its reason."""
    assert tuple(name for name in ATTENTIONS if refusal(family, name)) == REFUSES.get(family, ())
    for attention in REFUSES.get(family, ()):
        assert REASONS[attention] in refusal(family, attention)


@pytest.mark.parametrize("attention", sorted(set(REASONS) - set(ATTENTIONS)))
def test_no_other_attention_computes_here(attention: str) -> None:
    assert REASONS[attention] in refusal("llama", attention)


def test_no_attention_is_forgotten() -> None:
    assert {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} == set(REASONS)

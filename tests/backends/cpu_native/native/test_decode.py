"""Decoding one token at a time through the kernels: every family is as near float64 as transformers is.

The truth is transformers' model in float64. Over the decoded steps, with e = |value - truth| / |truth| of each step's
logits in Euclidean norms: rms(e_ours) <= 2 rms(e_transformers) + 2 u, as tests/backends/test_families.py holds it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import smedjan.api
from smedjan.backends.cpu_native import native
from smedjan.checkpoint import int8
from smedjan.checkpoint.dtype import to_float32
from smedjan.errors import ConfigError
from smedjan.generate import generate
from smedjan.graph.program import Program
from smedjan.runtime.session import Cache, Session
from tests.conftest import make_peer
from tests.families import ALL, CASES, make_model, make_session_of
from tests.tolerances import UNIT_ROUNDOFF

IDS = [5, 80, 13, 7, 44, 21, 9, 30, 8, 77, 61, 2, 19]
PREFILL = 3
FIRST = [(family, next(iter(cases))) for family, cases in CASES.items()]
ROUNDS = [
    *(("float32", *pair) for pair in ALL if pair in FIRST or any(word in pair[1] for word in ("rope", "window"))),
    *(("bfloat16", *pair) for pair in FIRST),
]


def steps(session: Session) -> list[np.ndarray]:
    """The logits of each token behind the prompt, fed by itself."""
    cache = Cache(session, batch=1, capacity=128)
    cache.feed([IDS[:PREFILL]], last=True)
    made = []
    for token in IDS[PREFILL:]:
        raw = session.backend.to_raw(cache.feed([[token]], last=True))
        made.append(to_float32(raw).reshape(-1).astype(np.float64))
    return made


def decode_program(session: Session) -> Program:
    return next(made for (kind, form, *_), made in session.programs.items() if kind == "logits" and form.seq == 1)


def peers(model: torch.nn.Module) -> list[np.ndarray]:
    with torch.no_grad():
        made, past = [], None
        for block in [IDS[:PREFILL], *([token] for token in IDS[PREFILL:])]:
            out = model(torch.tensor([block]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            made.append(out.logits[0, -1].double().numpy())
    return made[1:]


def rms(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    errors = [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in zip(found, truth, strict=True)]
    return float(np.sqrt(np.mean(np.square(errors))))


@pytest.mark.parametrize(("dtype", "family", "case"), ROUNDS, ids=lambda value: value)
def test_decoding_is_as_near_the_truth_as_transformers(dtype: str, family: str, case: str) -> None:
    assert native.available()
    model = make_model(family, CASES[family][case], dtype=dtype, attention="eager").eval()
    session = make_session_of(model, attention="eager", on="cpu_native")
    found, plain = steps(session), peers(model)
    labels = {row["lowering"] for row in decode_program(session).lowerings()}
    assert any(label.startswith("native") for label in labels)
    truth = peers(model.double())
    most = 2 * rms(plain, truth) + 2 * UNIT_ROUNDOFF[getattr(torch, dtype)]
    assert rms(found, truth) <= most


def llama(**changes) -> Session:
    return make_session_of(make_peer(num_key_value_heads=2, eos_token_id=None, **changes).eval(), on="cpu_native")


def test_a_llamas_token_is_one_tape() -> None:
    """Every op of a Llama has a kernel or is a view: one call into the library a token."""
    session = llama()
    steps(session)
    program = decode_program(session)
    views = {"split", "split_heads", "merge_heads", "reshape"}
    by_op = {row["op"]: row["lowering"] for row in program.lowerings()}
    assert all(by_op[op].startswith("native") for op in by_op.keys() - views), by_op
    assert len(program._stretches) == 1


def test_what_is_observed_is_what_is_computed() -> None:
    session, seen = llama(), {}
    cache = Cache(session, batch=1, capacity=128)
    cache.feed([IDS], last=True)
    form_of = session.logits_program

    def observed(form):
        program = form_of(form)
        return lambda inputs: program(inputs, observe=lambda node, outs: seen.update({node: outs}))

    plain = Cache(session, batch=1, capacity=128)
    plain.feed([IDS], last=True)
    expected = plain.feed([[7]], last=True)
    session.logits_program = observed
    made = cache.feed([[7]], last=True)
    assert torch.equal(made, expected)
    program = decode_program(session)
    assert {call.node for call in program.calls} == seen.keys()
    assert torch.equal(seen[program.graph.outputs["logits"].node][0], expected)


def test_two_generations_at_once_keep_their_caches() -> None:
    session = llama()
    alone = [list(generate(session, prompt, max_new_tokens=12)) for prompt in (IDS, IDS[::-1])]
    streams = [generate(session, prompt, max_new_tokens=12) for prompt in (IDS, IDS[::-1])]
    both = [list(pair) for pair in zip(*(zip(*streams, strict=True)), strict=True)]
    assert both == alone


def test_without_a_compiler_aten_runs_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps(llama())
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "no compiler")
    session = llama()
    for ours, theirs in zip(steps(session), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    by_op = {row["op"]: row["lowering"] for row in decode_program(session).lowerings()}
    assert by_op["linear"] == "aten, no compiler"
    assert by_op["rms_norm"] == "cpu_native fused rms_norm, no compiler"
    assert type(decode_program(session)) is Program


def in_eight_bits(session: Session) -> tuple[Session, Session]:
    """The session with 8-bit weights, and one in float with the values that those stand for."""
    backend, names = session.backend, session.config.eight_bit_weights()
    codes, values = dict(session.parameters), dict(session.parameters)
    for name in names:
        parts, *_ = int8.quantize(backend.to_raw(codes.pop(name)))
        codes.update({f"{name}.{suffix}": backend.from_raw(raw) for suffix, raw in parts.items()})
        values[name] = torch.from_numpy(int8.dequantize(parts)).to(values[name].dtype)
    return replace(session, parameters=codes, int8=names), replace(session, parameters=values)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("on", ["cpu_native", "torch_reference"])
def test_eight_bit_logits_are_those_of_the_weights_that_the_codes_stand_for(on: str, tied: bool) -> None:
    """As near the truth, transformers' model of those weights in float64, as transformers is in float32."""
    model = make_peer(num_key_value_heads=2, eos_token_id=None, tie_word_embeddings=tied).eval()
    session, valued = in_eight_bits(make_session_of(model, on=on))
    found = steps(session)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(valued.parameters[name])
    plain = peers(model)
    truth = peers(model.double())
    assert rms(found, truth) <= 2 * rms(plain, truth) + 2 * UNIT_ROUNDOFF[torch.float32]
    if on == "cpu_native":
        labels = {row["op"]: row["lowering"] for row in decode_program(session).lowerings()}
        assert labels["int8_linear"] == "native int8 matvec"
        assert labels["int8_embedding" if tied else "embedding"] == ("native int8 gather" if tied else "native gather")
        assert "linear" not in labels


def test_eight_bits_are_for_inference_alone(tmp_path: Path) -> None:
    session, _ = in_eight_bits(llama())
    model = smedjan.api.Model(SimpleNamespace(data={}, path=tmp_path), session)
    with pytest.raises(ConfigError, match="8-bit weights have no gradients"):
        model.loss_and_grads({"input_ids": [IDS], "labels": [IDS]})
    with pytest.raises(ConfigError, match="the model is in 8 bits"):
        model.save(tmp_path / "out")
    assert {name: tuple(array.shape) for name, array in session.parameters.items()} == {
        name: shape for name, (shape, _) in session.specs().items()
    }

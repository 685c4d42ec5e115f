"""`smedjan.parity`: every case equal on the exact backend, within the bound on fast ones, and red for a wrong weight.
Issue 3, Shows: bit equality against `transformers`' own output; "mutations make the parity test fail"."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import smedjan
import smedjan.hf.parity as module
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.cli import app
from smedjan.hf.parity import compare
from smedjan.hf.peer import Peer
from smedjan.hf.peer_trace import Trace
from tests.hf.tiny_families import FAMILIES, session_of, tiny

MODES, PADDINGS, ATTENTIONS = ("logits", "gradients", "decode"), ("none", "left", "right"), ("sdpa", "eager")


def test_equal_on_the_exact_backend(model_directory):
    """36 cases: both attentions, dtypes, three paddings; logits, every gradient, cached decode. Not one bit off."""
    seen = []
    report = smedjan.parity(model_directory(), backend="torch_reference", on_case=seen.append)
    wanted = {(a, d, m, p) for a in ATTENTIONS for d in ("float32", "bfloat16") for m in MODES for p in PADDINGS}
    assert {(case.attention, case.dtype, case.mode, case.padding) for case in report.cases} == wanted
    assert len(report.cases) == len(wanted)
    assert [case.name for case in report.cases if not case.equal] == []
    assert all(case.max_abs == 0 and case.max_ulp == 0 and case.bound == 0 for case in report.cases)
    assert report.ok
    assert report.exact
    assert tuple(seen) == report.cases
    assert {"transformers", "torch"} <= set(report.versions)


@pytest.mark.parametrize("backend", ["cpu_native", "mlx_metal"])
def test_within_the_bound_on_a_fast_backend(model_directory, backend):
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert not report.exact
    assert len(report.cases) == 9
    off = [f"{case.name}: {case.error:.3e} > {case.bound:.3e}" for case in report.cases if not case.holds]
    assert off == []
    assert report.ok
    assert all(0 < case.bound < 1e-3 for case in report.cases if not case.equal), "the bound says something"


def corrupt(monkeypatch, name, relative):
    """One element of a weight of ours is off; transformers reads the directory as it is."""
    honest = module.open_session

    def open_session(files, backend, **settings):
        session = honest(files, backend, **settings)
        raw = backend.to_raw(session.parameters[name])
        assert raw.dtype == "float32"
        values = to_float32(raw).copy()
        values[np.abs(values).argmax()] *= np.float32(1 + relative)
        session.parameters[name] = backend.from_raw(
            RawTensor(dtype=raw.dtype, shape=raw.shape, data=memoryview(values).cast("B"))
        )
        return session

    monkeypatch.setattr(module, "open_session", open_session)


@pytest.mark.parametrize(
    ("backend", "relative"), [("torch_reference", 1e-6), ("cpu_native", 1e-2), ("mlx_metal", 1e-2)]
)
def test_a_corrupted_weight(model_directory, monkeypatch, backend, relative):
    """One element, by a millionth where bits count and by a hundredth where a bound does: no mode of any padding holds
    in all of its cases."""
    corrupt(monkeypatch, "model.layers.0.mlp.down_proj.weight", relative)
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert not report.ok
    assert {case.mode for case in report.cases if not case.holds} == set(MODES)


def test_the_seed_draws_the_rows(model_directory, monkeypatch):
    """Other rows, equal as well; a corrupted weight gives other distances on them."""
    directory = model_directory()
    settings = {"attention": ["sdpa"], "dtypes": ["float32"]}
    assert smedjan.parity(directory, seed=7, **settings).ok
    corrupt(monkeypatch, "model.norm.weight", 1e-3)
    reports = [smedjan.parity(directory, seed=seed, **settings) for seed in (7, 8)]
    assert reports[0].cases[0].max_abs != reports[1].cases[0].max_abs


def tamper(monkeypatch, mode, name, change):
    """One result of ours is changed, behind the programs."""
    honest = module._ours

    def ours(session, batch, script):
        made = honest(session, batch, script)
        made[mode][name] = change(made[mode][name])
        return made

    monkeypatch.setattr(module, "_ours", ours)


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native"])
def test_a_nan_anywhere_is_out_of_bound(model_directory, monkeypatch, backend):
    """In the last tensor of many too, where a comparison with NaN could be taken for one that holds."""

    def poison(values):
        values = values.copy()
        values.flat[-1] = np.nan
        return values

    tamper(monkeypatch, "gradients", "model.norm.weight", poison)
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert {case.mode for case in report.cases if not case.holds} == {"gradients"}
    assert not report.ok


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_a_wrong_loss_is_out_of_bound(model_directory, monkeypatch, backend):
    """The gradients are made apart from it on a fast backend: a loss that is off by a thousandth shows by itself."""
    tamper(monkeypatch, "gradients", "loss", lambda loss: loss * np.float32(1.001))
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert [case.mode for case in report.cases if not case.holds] == ["gradients"] * 3


def test_a_failure_is_bisected(model_directory, monkeypatch):
    """Where a weight is off, every case parts at its product."""
    corrupt(monkeypatch, "model.layers.1.mlp.down_proj.weight", 1e-4)
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"])
    assert {(case.parted.layer, case.parted.op, case.parted.module) for case in report.cases} == {
        (1, "linear", "model.layers.1.mlp.down_proj")
    }
    assert all(case.tensor for case in report.cases)


def save(model, directory, **changes):
    model.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def test_what_transformers_refuses_is_skipped_with_its_reason(tmp_path):
    """It has no sdpa for Gemma 2: nothing is counted as passing, and nothing alone is not enough."""
    directory = save(tiny("gemma2"), tmp_path / "gemma2")
    report = smedjan.parity(directory, dtypes=["float32"])
    assert {case.attention for case in report.cases} == {"eager"}
    assert report.ok
    assert [skip["name"] for skip in report.skipped] == ["sdpa float32"]
    assert "does not support an attention implementation" in report.skipped[0]["reason"]
    report = smedjan.parity(directory, attention=["sdpa"], dtypes=["float32"])
    assert (report.cases, report.ok) == ((), False)


def test_a_silent_fallback_is_a_refusal(tmp_path, monkeypatch):
    directory = save(tiny("llama"), tmp_path / "llama")
    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", lambda self, name: None)
    report = smedjan.parity(directory, dtypes=["float32"])
    assert report.skipped == (
        {"name": "sdpa float32", "reason": "LlamaForCausalLM computes eager where sdpa is asked for"},
    )


def test_texts_go_past_the_window_or_say_so(tmp_path):
    """Prefill and decode both cross it, and one text begins short of it; what does not fit is listed."""
    model = tiny("mistral", sliding_window=20)
    session, peer = session_of(model), Peer(model)
    assert module._prefills(session.config, 128) == (24, 19)
    assert all(case.equal and case.seq == 24 for case in compare(session, peer))
    directory = save(model, tmp_path / "mistral")
    report = smedjan.parity(directory, attention=["eager"], dtypes=["float32"], length=16)
    assert {case.seq for case in report.cases} == {12}
    assert report.skipped == ({"name": "past 20 tokens", "reason": "the texts have 16 tokens; give --length 24"},)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "changes", "prefills"),
    [
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}, (20, 15)),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
                "max_position_embeddings": 24,
            },
            (28, 23),
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_rope_that_changes_with_the_length(family, changes, prefills):
    """Both sides of the switch and a decode across it. The peer's table has no memory of the text before."""
    model = tiny(family, **changes)
    session = session_of(model)
    assert module._prefills(session.config, 128) == prefills
    for _ in range(2):
        assert [case.name for case in compare(session, Peer(model)) if not case.equal] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_live_models_of_every_kind(family, dtype):
    """Without files: a session and a model, one after the other."""
    model = tiny(family, dtype=dtype)
    cases = list(compare(session_of(model), Peer(model), paddings=("left",)))
    assert [case.mode for case in cases] == list(MODES)
    assert [case.name for case in cases if not case.equal] == []


def test_a_parameter_without_a_gradient_has_zeros():
    """transformers leaves none where the loss reads nothing of a parameter; nor do we, and neither is a difference."""
    model = tiny("llama")
    model.model.spare = torch.nn.Linear(4, 4)
    session = session_of(model)
    assert "model.spare.weight" in session.parameters
    cases = {case.mode: case for case in compare(session, Peer(model), paddings=("none",))}
    assert cases["gradients"].equal
    tensors = Peer(model).run(module._rows(session.config, "none", 0, 12), (12,))["gradients"]
    assert tensors["model.spare.weight"].shape == (4, 4)
    assert not tensors["model.spare.weight"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_peer_narrows_nothing(family):
    """Not one float of a run, its backward pass or its decoding is narrower than float64."""
    peer = Peer(tiny(family, dtype="bfloat16")).widened()
    config, made = session_of(tiny(family)).config, set()
    batch = module._rows(config, "left", 0, 12)
    with Trace(lambda call: made.add(call.tensor.dtype)):
        peer.run(batch, (12,))
    assert {dtype for dtype in made if dtype.is_floating_point} == {torch.float64}


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "gpt_neox", "olmo2"])
def test_a_widened_peer_sees_what_float32_cannot(family):
    """A weight moved by some 1e-10 of itself, and by twice that: the logits follow in proportion. Those of
    transformers' model in float64 alone do not, since it rounds to float32 on its way."""
    model = tiny(family)
    batch = module._rows(session_of(model).config, "none", 0, 12)

    def follows(peer):
        weight = next(p for name, p in peer.model.named_parameters() if "layers.0" in name and p.ndim > 1)
        kept, seen = weight.detach().clone(), []
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1), dtype=kept.dtype)
        for step in (0.0, 1e-10, 2e-10):
            with torch.no_grad():
                weight.copy_(kept * (1 + step * noise))
            seen.append(peer.backward(batch)[0]["logits"])
        once, twice = seen[1] - seen[0], seen[2] - seen[0]
        return float(np.abs(once).max()) > 0 and np.linalg.norm(twice - 2 * once) < 1e-3 * np.linalg.norm(twice)

    assert follows(Peer(model).widened())
    rounded = Peer(model).widened()
    rounded._precision = lambda: torch.enable_grad()
    assert not follows(rounded)


def test_the_command(tmp_path, capsys):
    """One line a case, code 0; a page where one is asked for; code 1 and the place where a model is another."""
    model, page = tiny("llama"), tmp_path / "page.html"
    directory = save(model, tmp_path / "right")
    words = ["parity", str(directory), "--attention", "eager", "--dtype", "float32"]
    assert app.run([*words, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "9 of 9 cases equal to the bit" in printed
    assert printed.count(" equal\n") == 9
    assert page.read_text().startswith("<!doctype html>")
    assert app.run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "attention", "dtype", "mode", "batch", "padding", "equal", "max_abs", "max_ulp", "bound"} <= set(
        found["cases"][0]
    )
    assert found["cases"][0]["parted"] is None


def test_the_command_on_a_failure(tmp_path, capsys, monkeypatch):
    directory = save(tiny("llama"), tmp_path / "model")
    corrupt(monkeypatch, "model.layers.2.self_attn.o_proj.weight", 1e-3)
    words = ["parity", str(directory), "--attention", "eager", "--dtype", "float32"]
    assert app.run(words) == 1
    printed = capsys.readouterr().out
    assert "eager float32 logits padding=none parts at layer 2, linear: " in printed
    assert "0 of 9 cases equal to the bit" in printed
    assert app.run([*words, "--json"]) == 1
    parted = json.loads(capsys.readouterr().out)["cases"][0]["parted"]
    assert (parted["layer"], parted["op"], parted["module"]) == (2, "linear", "model.layers.2.self_attn.o_proj")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--length", "0"], "length: is 0"), (["--html", "{directory}/no/where/page.html"], "html: cannot be written")],
)
def test_wrong_flags_are_code_2(tmp_path, capsys, words, message):
    directory = save(tiny("llama"), tmp_path / "model")
    words = [word.format(directory=directory) for word in words]
    assert app.run(["parity", str(directory), "--attention", "eager", "--dtype", "float32", *words]) == 2
    assert message in capsys.readouterr().err


def test_attentions_that_we_do_not_have(model_directory):
    with pytest.raises(smedjan.SmedjanError, match="give sdpa or eager"):
        smedjan.parity(model_directory(), attention=["flash_attention_2"])


def test_an_error_that_is_no_number_is_not_within_a_bound():
    case = module.Case(
        name="x",
        attention="sdpa",
        dtype="float32",
        mode="logits",
        batch=2,
        seq=12,
        padding="none",
        equal=False,
        max_abs=1.0,
        max_ulp=5,
        tensor="logits",
        error=float("nan"),
        bound=1e-6,
    )
    assert not case.holds
    assert replace(case, error=1e-7).holds

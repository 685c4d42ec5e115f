"""Segments change no bit, hold no more than planned, give up what must be given up; and Metal is told of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_pair import MLX, bound, to_torch
from test_mlx_llama import batch

from smedjan.backends import mlx_metal
from smedjan.backends.mlx_metal import MlxBackend, glu, limits, program, segments
from smedjan.backends.mlx_metal.elementwise import DTYPES
from smedjan.backends.mlx_metal.limits import Limits, limits_of
from smedjan.backends.mlx_metal.program import MlxProgram, Pool
from smedjan.errors import BackendError
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Graph
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import read_config
from smedjan.ops.elementwise import add, mul
from smedjan.ops.quantized import Affine
from smedjan.ops.shape import concat
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Cache, Session
from smedjan.train.step import Trainer

GB = 10**9


def model(*, layers: int = 5, hidden: int = 64, vocab: int = 512) -> DecoderConfig:
    data = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return read_config(data, Path("config.json"))


def session(
    given: DecoderConfig, dtype: str, *, method: str = "full", dropout: float = 0.0, memory: int | None = None
) -> Session:
    lora = None
    if method != "full":
        lora = Lora(rank=8, alpha=16.0, dropout=dropout, targets=given.linear_layers())
    quantized = given.linear_weights() if method == "qlora" else ()
    coded = dict.fromkeys(given.linear_weights(), Affine(bits=4, group_size=64)) if method == "affine" else {}
    made = Session(MLX, given, {}, dtype, lora=lora, quantized=quantized, affine=coded, memory=memory)
    key = mx.random.key(3)
    for name, (shape, stored) in made.specs().items():
        key, one = mx.random.split(key)
        if stored in ("float32", "bfloat16"):
            made.parameters[name] = (mx.random.normal(shape, key=one) * 0.1).astype(DTYPES[stored])
        else:
            made.parameters[name] = mx.random.randint(0, 127, shape, key=one).astype(DTYPES[stored])
    mx.eval(made.parameters)
    return made


def names_of(made: Session) -> list[str]:
    return [name for name in made.specs() if made.lora is None or ".lora_" in name]


def rows(count: int, seq: int, vocab: int) -> SimpleNamespace:
    ids = np.random.default_rng(5).integers(4, vocab, (count, seq))
    labels = np.roll(ids, -1, 1)
    labels[:, -1] = -100
    return SimpleNamespace(
        input_ids=ids,
        position_ids=np.broadcast_to(np.arange(seq), ids.shape),
        labels=labels,
        attention_mask=None,
        segment_ids=None,
        kind="causal",
        trained_tokens=count * (seq - 1),
    )


def last_program(made: Session) -> MlxProgram:
    found = list(made.programs.values())[-1]
    assert isinstance(found, MlxProgram)
    return found


def bits(arrays: dict) -> dict:
    return {name: to_torch(MLX, array).clone() for name, array in arrays.items()}


def whole(given: MlxProgram) -> MlxProgram:
    return MlxProgram(given.graph, MLX.rules, fuse=False, cut=False)


@pytest.mark.parametrize(("method", "dtype"), [("full", "float32"), ("lora", "bfloat16")])
def test_cuts_change_no_bit(dtype, method):
    """Of a loss, its gradients added to totals, and an update: in segments and in one graph."""
    found = []
    for cut in (True, False):
        made = session(model(layers=3), dtype, method=method, dropout=0.0 if method == "full" else 0.1)
        names, given = names_of(made), rows(2, 24, 512)
        trainer = Trainer(made, names, AdamW(master=True))
        if not cut:
            make = made.finish
            made.finish = lambda graph, make=make, **_: whole(make(graph))  # type: ignore[method-assign]
            trainer.update = whole(trainer.update)
        _, totals = made.micro(given, names, num_items=40.0, dropout_key=(1, 2, 3, 0))
        loss, totals = made.micro(given, names, num_items=40.0, totals=totals, dropout_key=(1, 2, 3, 1))
        assert (len(last_program(made).schedule.segments) > 4) is cut
        assert (len(trainer.update.schedule.segments) > 1) is cut
        updated = trainer.update(trainer._inputs(totals, 1, 1e-3))
        found.append(bits({"loss": loss, **totals}) | {f"new.{k}": v for k, v in bits(updated).items()})
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_share_their_functions(method, monkeypatch):
    """Layers, dropout's sites and all, are traced once: more of them need no more functions, where memory cuts none."""
    monkeypatch.setattr(segments, "SLACK", 1e-3)
    counts = []
    for layers in (3, 8):
        made = session(model(layers=layers), "bfloat16", method=method, dropout=0.0 if method == "full" else 0.1)
        made.micro(rows(1, 16, 512), names_of(made), num_items=15.0)
        counts.append((len(made._pools["mlx_metal"].functions), len(last_program(made).schedule.segments)))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] >= counts[0][1] + 10


DRAWN = [
    ("full", "float32", 4, 64, 512, 3, 48, 2),
    ("full", "bfloat16", 3, 96, 1024, 2, 64, 1),
    ("lora", "float32", 5, 64, 512, 2, 64, 2),
    ("lora", "bfloat16", 4, 64, 1024, 2, 48, 1),
    ("qlora", "bfloat16", 4, 64, 512, 2, 64, 2),
]


@pytest.mark.parametrize(("method", "dtype", "layers", "hidden", "vocab", "count", "seq", "times"), DRAWN)
def test_memory_is_what_is_planned(method, dtype, layers, hidden, vocab, count, seq, times, monkeypatch):
    """MLX's own peak over micro-batches and an update is within a tenth of the plan's, above or below, where it waits
    for a few bytes as it does for many."""
    monkeypatch.setattr(program, "RUN_AHEAD", 1)
    made = session(model(layers=layers, hidden=hidden, vocab=vocab), dtype, method=method)
    names, given, totals = names_of(made), rows(count, seq, vocab), None
    trainer = Trainer(made, names, AdamW(master=True))
    mx.eval(trainer.state)

    def measured(of, run):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = run()
        peak = mx.get_peak_memory() - before + of().schedule.inputs
        assert abs(peak / of().peak_bytes - 1) < 0.1, (peak, of().peak_bytes)
        return found

    for _ in range(times):
        held = totals
        _, totals = measured(
            lambda: last_program(made), lambda held=held: made.micro(given, names, num_items=9.0, totals=held)
        )
    inputs = trainer._inputs(totals, 1, 1e-3)
    measured(lambda: trainer.update, lambda: trainer.update(inputs))


def test_an_update_leaves_no_old_state_behind():
    """What the caller holds is what was made: old weights and moments are in nobody's hands, though nothing was handed
    back."""
    made = session(model(layers=2), "float32")
    names = names_of(made)
    trainer = Trainer(made, names, AdamW())
    mx.eval(trainer.state)
    grads = {name: mx.ones_like(made.parameters[name]) for name in names}
    mx.eval(grads)
    before, old = mx.get_active_memory(), bits({name: made.parameters[name] for name in names})
    updated = trainer.update(trainer._inputs(grads, 1, 1e-3))
    # Old ones would be three quarters of it once more; a buffer may be 16 KB larger than what took its place.
    assert abs(mx.get_active_memory() - before) < before // 10
    for name in names:
        assert updated[name] is made.parameters[name]
        assert not torch.equal(to_torch(MLX, updated[name]), old[name]), name


def test_less_memory_changes_what_is_kept_and_no_bit(monkeypatch):
    monkeypatch.setattr(program, "RUN_AHEAD", 1)
    given, shapes = rows(2, 64, 512), model(layers=6)
    plenty = session(shapes, "bfloat16", method="lora")
    names = names_of(plenty)
    loss, grads = plenty.micro(given, names, num_items=9.0)
    needed = last_program(plenty).peak_bytes
    assert last_program(plenty).memory() == []
    less_than_needed = needed * 3 // 4
    less = session(shapes, "bfloat16", method="lora", memory=less_than_needed)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    again, tight = less.micro(given, names, num_items=9.0)
    tighter = last_program(less)
    assert {row["what"] for row in tighter.memory()} == {"recompute"}
    assert tighter.peak_bytes <= less_than_needed
    assert mx.get_peak_memory() - before + tighter.schedule.inputs < 1.1 * less_than_needed
    assert torch.equal(to_torch(MLX, loss), to_torch(MLX, again))
    for name in names:
        assert torch.equal(to_torch(MLX, grads[name]), to_torch(MLX, tight[name])), name
    none = session(shapes, "bfloat16", method="lora", memory=needed // 50)
    with pytest.raises(BackendError, match="a step needs") as error:
        none.micro(given, names, num_items=9.0)
    assert error.value.field == "memory"


def test_compiled_segments_give_the_same_within_rounding():
    """The CPU build compiles what it fuses with a C++ compiler: one function for every layer of a chain whose values
    are all kept. Two roundings a layer, fused or not, which later products carry on."""
    graph, layers = Graph(), 24
    x, w = graph.input("x", (8, 16), "float32"), graph.input("w", (8, 16), "float32")
    kept = []
    for layer in range(layers):
        with graph.scope(f"layers.{layer}"):
            x = mul(add(x, w), w)
            kept.append(x)
    graph.output("y", concat(*kept, dim=0))
    pool = Pool()
    compiled = MlxProgram(graph, MLX.rules, fuse=True, pool=pool)
    assert (len(compiled.schedule.segments), len(pool.functions)) == (layers + 1, 2)
    inputs = {"x": mx.random.normal((8, 16)), "w": mx.random.uniform(shape=(8, 16))}
    made, plain = compiled(inputs)["y"], MlxProgram(graph, MLX.rules, fuse=False)(inputs)["y"]
    # |x_l| <= |x| + l, and each rounding is of what is no larger, with w < 1 on the way
    assert float(mx.abs(made - plain).max()) <= 2 * layers * 2.0**-24 * (float(mx.abs(inputs["x"]).max()) + layers)


def test_adapters_keep_the_narrow_values_that_they_widen(monkeypatch):
    """Beside a base in MLX's format adapters read float32 copies of bfloat16 values: kept as those, the same bits come
    out of less."""
    found = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(mlx_metal, "narrow", lambda graph: graph)
        made = session(model(layers=4), "bfloat16", method="affine")
        _, grads = made.micro(rows(2, 64, 512), names_of(made), num_items=9.0)
        found.append((last_program(made).peak_bytes, bits(grads)))
    (less, ours), (more, plain) = found
    assert less < 0.9 * more
    for name, one in ours.items():
        assert torch.equal(one, plain[name]), name


def test_decoding_is_compiled_but_for_what_a_cache_decides():
    """One function holds a layer's end and the next one's beginning, whatever the layers and the tokens: nothing is
    traced anew for a token, and the logits are those of the program that is not compiled, but for rounding."""
    plain = session(model(layers=3), "float32")
    counted, traced = RuleTable("mlx_metal", parent=MLX.rules), []
    counted.rule("glu")(lambda *arrays, **attrs: traced.append(1) or glu.glu(*arrays, **attrs))
    backend = MlxBackend(compiled=True)
    backend.rules = counted
    compiled = Session(backend, plain.config, plain.parameters, "float32")
    caches = [Cache(made, batch=1, capacity=16) for made in (plain, compiled)]
    ids, traces = np.array([[7]]), []
    for _ in range(4):
        logits = [to_torch(MLX, cache.feed(ids, last=True)) for cache in caches]
        # Ops that are fused round otherwise; a path through the layers sums as many terms as they are wide.
        assert float((logits[0] - logits[1]).abs().max()) <= bound(logits[0], logits[0], "float32", 3 * 192)
        ids = logits[0].argmax(-1).numpy().reshape(1, 1)
        traces.append(len(traced))
    assert traces[0] == traces[-1] > 0
    decode = last_program(compiled)
    assert len({id(f) for f in decode._functions}) < len(decode.schedule.segments)
    assert {each.dynamic for each in decode.schedule.segments} == {True, False}


@pytest.mark.parametrize(
    ("planned", "macos", "expected"),
    [
        (5 * GB, (15, 1), Limits(memory=11 * GB, cache=6 * GB, wired=5 * GB)),
        (11 * GB, (26, 0), Limits(memory=11 * GB, cache=0, wired=11 * GB)),
        (5 * GB, (14, 7), Limits(memory=11 * GB, cache=6 * GB, wired=None)),
    ],
)
def test_what_a_mac_is_told(planned, macos, expected):
    assert limits_of(planned, working_set=11 * GB, macos=macos, remedy="") == expected


def test_what_would_swap_is_refused_with_a_remedy():
    with pytest.raises(BackendError, match=r"12 GB are needed, and this Mac's GPU holds 11 GB") as error:
        limits_of(12 * GB, working_set=11 * GB, macos=(15, 0), remedy="train shorter rows")
    assert (error.value.field, error.value.remedy) == ("memory", "train shorter rows")


def test_limits_are_taken_back():
    """By MLX's own word, which it gives of one of the three; also where a run ends in an error."""
    before = mx.get_memory_limit()
    seen = []

    def run():
        with limits.applied(Limits(memory=3 * GB, cache=GB, wired=None)):
            seen.append(mx.get_memory_limit())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert seen == [3 * GB]
    assert mx.get_memory_limit() == before


def test_a_program_takes_its_limit_back():
    before = mx.get_memory_limit()
    made = session(model(layers=2), "float32")
    made.logits(batch("causal"))
    assert mx.get_memory_limit() == before


def test_metal_gives_a_session_what_its_gpu_holds(monkeypatch):
    """All of it where nothing else is said, less what the optimizer keeps; on the CPU build nothing is given up."""
    monkeypatch.setattr(limits, "working_set", lambda: 11 * GB)
    mac = MlxBackend()
    assert mac.pool() == Pool(None)
    mac.device = "metal"
    assert mac.pool(reserved=GB).memory == 10 * GB
    assert mac.pool(4 * GB, GB).memory == 3 * GB

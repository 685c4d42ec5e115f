"""The pass to 4 or 8 bits: what it replaces, that adapters find it, that no dequantised weight lives until backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smedjan.checkpoint import stored
from smedjan.models.decoder import Decoder, Form
from smedjan.ops.quantized import STORED, int8_dequantize, nf4_dequantize, nf4_specs
from smedjan.passes.lora import Lora, adapt
from smedjan.passes.quantize import quantize
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from tests.backends.cpu_native.fused_cases import Float64
from tests.conftest import assert_bits, make_batch, make_peer, make_session
from tests.tolerances import UNIT_ROUNDOFF, assert_close, assert_near, error

LORA = Lora(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
}
"""Rows of whole blocks but for o_proj's 48 columns."""
BACKENDS = ["torch_reference", "cpu_native", "cuda_triton"]


def quantized(
    *, on: str, lora: Lora | None = LORA, dtype: str = "float32", storage: str = "nf4"
) -> tuple[Session, Session]:
    """A session of NF4 or int8 weights, and one of the same weights dequantised; random adapters beside both."""
    plain = make_session(make_peer(dtype=dtype, **SIZES), lora=lora)
    plain.backend = backend(on)
    made = Session(plain.backend, plain.config, dict(plain.parameters), plain.dtype, lora=lora, storage=storage)
    made.quantized = plain.config.linear_weights()
    for name in made.quantized:
        raw = plain.backend.to_raw(made.parameters.pop(name))
        parts = stored.quantize(storage, raw)
        made.parameters.update({f"{name}.{key}": plain.backend.from_raw(part) for key, part in parts.items()})
        plain.parameters[name] = plain.backend.from_raw(stored.dequantize(storage, parts, raw.shape, raw.dtype))
    if lora is not None:
        generator = torch.Generator().manual_seed(4)
        for name, shape in lora.shapes(plain.config.parameter_shapes()).items():
            array = torch.randn(shape, generator=generator) * 0.2
            made.parameters[name], plain.parameters[name] = array, array.clone()
    return made, plain


def references(plain: Session, lora: Lora | None) -> tuple[Session, Session]:
    """The same weights on the exact backend, in their dtype and in float64."""
    exact, wide = (Session(backend("torch_reference"), plain.config, {}, plain.dtype, lora=lora) for _ in range(2))
    exact.parameters = {name: array.clone() for name, array in plain.parameters.items()}
    wide.backend, wide.parameters = Float64(), {name: array.double() for name, array in plain.parameters.items()}
    return exact, wide


def names_of(session: Session) -> list[str]:
    return [name for name in session.parameters if ".lora_" in name]


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BITS = [("torch_reference", dtype, LORA, storage) for dtype in ("float32", "bfloat16") for storage in STORED] + [
    ("cuda_triton", "bfloat16", replace(LORA, targets=ALL_LINEAR), storage) for storage in STORED
]
"""Planned backends stack the weights that lie in memory for good, and a library sums their products at once: the bits
are those of dequantised weights only where a kernel takes each weight by itself."""


@pytest.mark.parametrize(("on", "dtype", "lora", "storage"), BITS, ids=str)
def test_gradients_are_those_of_the_dequantised_weights(on, dtype, lora, storage):
    """The same bits, loss and every adapter's gradient: forward and backward multiply by the same numbers."""
    ours, plain = quantized(on=on, dtype=dtype, lora=lora, storage=storage)
    batch = make_batch("right")
    loss, grads = ours.micro(batch, names_of(ours), num_items=batch.trained_tokens)
    other, theirs = plain.micro(batch, names_of(plain), num_items=batch.trained_tokens)
    assert_bits(loss, other, "loss")
    for name in names_of(ours):
        assert float(grads[name].abs().max()) > 0
        assert_bits(grads[name], theirs[name], name)


@pytest.mark.parametrize("storage", STORED)
def test_gradients_are_near_those_of_the_dequantised_weights(storage):
    """Where stacked products sum in another order: within the whole model's bound of float64.

    A loss is a single number, bounded through its logits as in tiny_llama.check_step: |loss - wide| <= 2 max|logits
    error| + 2 n u |wide|, of which the logits are held to their own bound.
    """
    ours, plain = quantized(on="cpu_native", lora=LORA, storage=storage)
    exact, wide = references(plain, LORA)
    batch = make_batch("right")
    found, torchs, expected = (
        session.micro(batch, names_of(ours), num_items=batch.trained_tokens) for session in (ours, exact, wide)
    )
    logits, plains, wides = (
        session.logits(batch)[torch.from_numpy(batch.attention_mask) != 0] for session in (ours, exact, wide)
    )
    assert_near("logits", logits, wides, plains)
    bound = 2 * error(logits, wides) + 2 * batch.trained_tokens * UNIT_ROUNDOFF[torch.float32] * abs(float(expected[0]))
    assert error(found[0], expected[0]) <= bound
    for name in names_of(ours):
        assert_near(name, found[1][name], expected[1][name], torchs[1][name])


@pytest.mark.parametrize("lora", [None, LORA], ids=["base", "adapters"])
@pytest.mark.parametrize("storage", STORED)
def test_logits_and_evaluation(lora, storage):
    ours, plain = quantized(on="torch_reference", lora=lora, storage=storage)
    batch = make_batch()
    assert_bits(ours.logits(batch), plain.logits(batch), "logits")
    assert_bits(ours.micro(batch, (), num_items=9)[0], plain.micro(batch, (), num_items=9)[0], "loss")


@pytest.mark.parametrize("lora", [None, LORA], ids=["base", "adapters"])
def test_logits_and_evaluation_are_near(lora):
    ours, plain = quantized(on="cpu_native", lora=lora)
    exact, wide = references(plain, lora)
    batch = make_batch()
    assert_close("logits", ours.logits(batch), wide.logits(batch), exact.logits(batch))
    losses = (session.micro(batch, (), num_items=9)[0] for session in (ours, wide, exact))
    assert_close("loss", *losses)


def test_logits_of_few_rows_on_triton():
    """Where no gradient asks for the weights, they are multiplied from their 4 bits: within the bound."""
    ours, plain = quantized(on="cuda_triton", lora=None)
    reference = make_session(make_peer(**SIZES))
    reference.parameters, reference.dtype = {name: a.double() for name, a in plain.parameters.items()}, "float64"
    batch = make_batch(batch=1, seq=2)
    assert_close("logits", ours.logits(batch), reference.logits(batch), plain.logits(batch))


def test_decoding_multiplies_from_the_bits():
    """Triton's kernel for rows of whole blocks; o_proj's 48 columns are dequantised."""
    session, _ = quantized(on="cuda_triton", lora=None)
    program = session.logits_program(Form(batch=1, seq=1, capacity=8))
    counted = {(row["op"], row["lowering"]): row["count"] for row in program.lowerings()}
    assert counted["nf4_linear", "triton nf4_linear"] == 12
    assert counted["nf4_dequantize", "triton nf4_dequantize"] == 2


@pytest.mark.parametrize(("on", "storage"), [*((on, "nf4") for on in BACKENDS), ("cpu_native", "int8")])
def test_no_dequantised_weight_lives_from_forward_to_backward(on, storage):
    """Each is made for the forward, and again for the gradient that reads it. Of the lowest q, k and v none is asked
    for, since nothing below them is trained; a fused adapter's backward takes the weight all the same."""
    session, _ = quantized(on=on, storage=storage)
    rows = 0 if session.backend.exact else 4
    program = session.micro_program(Form(batch=2, seq=5, rows=rows), names_of(session))
    made = [call.node for call in program.calls if call.node.op in (nf4_dequantize, int8_dequantize)]
    readers = program.graph.readers()
    for node in made:
        places = {"backward" in reader.scope for reader in readers[node.outputs[0]]}
        assert len(places) == 1, f"{node} is read forward and backward"
    backward = [node for node in made if "backward" in node.scope]
    count = len(session.quantized)
    assert len(made) - len(backward) == count
    assert count - 3 <= len(backward) <= (count - 3 if session.backend.exact else count)


def test_inputs_are_the_stored_arrays():
    session = make_session(make_peer(num_key_value_heads=2))
    decoder = Decoder(session.config, Form(batch=2, seq=5, dtype="bfloat16"))
    decoder.graph.output("logits", decoder.logits())
    names = session.config.linear_weights()
    graph = quantize(decoder.graph, names)
    assert not set(names) & set(graph.inputs)
    for name in names:
        for suffix, spec in nf4_specs(decoder.parameters[name].shape).items():
            assert graph.inputs[f"{name}.{suffix}"].spec == spec
    rest = {name for name in decoder.graph.inputs if name not in names}
    assert rest <= set(graph.inputs)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= rest
    assert len(names) == 14
    session.quantized = names
    stored = {name: spec for name, spec in session.specs().items() if name.rpartition(".")[0] in names}
    assert stored == {name: (graph.inputs[name].shape, graph.inputs[name].dtype) for name in stored}
    assert len(stored) == 4 * len(names)


def test_adapters_find_their_modules():
    session = make_session(make_peer())
    decoder = Decoder(session.config, Form(batch=1, seq=3))
    decoder.graph.output("logits", decoder.logits())
    adapted = adapt(quantize(decoder.graph, session.config.linear_weights()), LORA)
    wanted = LORA.shapes(session.config.parameter_shapes())
    assert {name: t.shape for name, t in adapted.inputs.items() if ".lora_" in name} == wanted


@pytest.mark.parametrize("swapped", ["nibbles", "offset", "nested", "blocks"])
def test_a_mutation_of_the_format_is_seen(swapped):
    """The equality above holds for no other reading of the arrays."""
    ours, plain = quantized(on="torch_reference", lora=None)
    name = "model.layers.1.mlp.down_proj.weight"
    parts = {suffix: ours.parameters[f"{name}.{suffix}"] for suffix in nf4_specs((1, 1))}
    if swapped == "nibbles":
        parts["nf4"] = parts["nf4"] << 4 | parts["nf4"] >> 4
    elif swapped == "offset":
        parts["offset"] = torch.zeros(())
    elif swapped == "nested":
        parts["nested_absmax"] = parts["nested_absmax"] * 2
    else:
        parts["absmax"] = parts["absmax"].roll(1)
    ours.parameters.update({f"{name}.{suffix}": part for suffix, part in parts.items()})
    assert not torch.equal(ours.logits(make_batch()), plain.logits(make_batch()))

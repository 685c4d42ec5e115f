"""The GGUF container is read as llama.cpp defines it, and no damaged file is believed."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from smedjan.checkpoint.gguf_file import QUANTIZATIONS, GgufFile, read_gguf
from smedjan.errors import CheckpointError

BLOCKS = 6


def blocks_of(name: str) -> np.ndarray:
    """[2, bytes of a row]: random blocks whose float16 scales are finite."""
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    generator = np.random.default_rng(len(name) * 31 + size)
    if name in ("F32", "F16", "BF16"):
        values = generator.standard_normal((2, 64)).astype(np.float32)
        kinds = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        }
        return kinds[name].view(np.uint8)
    raw = generator.integers(0, 256, (2, BLOCKS // 2, size), dtype=np.uint8)
    scales = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [size - 2]}.get(name, [0])
    for at in scales:
        raw[..., at : at + 2] = generator.uniform(-2, 2, (2, BLOCKS // 2, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(2, -1)


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("a.float", 1.5)
    writer.add_bool("a.bool", True)
    writer.add_int64("a.int64", -(1 << 40))
    writer.add_string("a.string", "naïve ▁ 🙂")
    writer.add_array("a.strings", ["x", "", "ÿ"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -0.25])
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def everything(path: Path) -> Path:
    return write(path, {f"t.{name}": (name, blocks_of(name)) for name in QUANTIZATIONS})


def test_metadata_and_tensors_equal_the_gguf_package_s(tmp_path: Path) -> None:
    path = everything(tmp_path / "a.gguf")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.quantization == tensor.tensor_type.name
        assert bytes(found.data) == tensor.data.tobytes()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found.dequantize(), expected.reshape(found.shape))


def half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def scale_min(packed: bytes, index: int) -> tuple[int, int]:
    """ggml's get_scale_min_k4: eight 6-bit scales and minima in 12 bytes."""
    if index < 4:
        return packed[index] & 63, packed[index + 4] & 63
    scale = (packed[index + 4] & 15) | ((packed[index - 4] >> 6) << 4)
    return scale, (packed[index + 4] >> 4) | ((packed[index] >> 6) << 4)


def decode(name: str, raw: bytes) -> list[float]:
    """One block by ggml-quants.c, value by value, in Python floats."""
    if name == "Q8_0":
        return [half(raw, 0) * q for q in struct.unpack_from("<32b", raw, 2)]
    if name in ("Q4_0", "Q4_1"):
        start, offset, low = (2, -8, 0.0) if name == "Q4_0" else (4, 0, half(raw, 2))
        qs = raw[start:]
        return [half(raw, 0) * (q + offset) + low for q in [b & 15 for b in qs] + [b >> 4 for b in qs]]
    if name in ("Q5_0", "Q5_1"):
        start, offset, low = (2, -16, 0.0) if name == "Q5_0" else (4, 0, half(raw, 2))
        high, qs = struct.unpack_from("<I", raw, start)[0], raw[start + 4 :]
        nibbles = [b & 15 for b in qs] + [b >> 4 for b in qs]
        return [half(raw, 0) * ((q | ((high >> j & 1) << 4)) + offset) + low for j, q in enumerate(nibbles)]
    if name in ("Q4_K", "Q5_K"):
        packed, high, qs = raw[4:16], raw[16:48], raw[48:] if name == "Q5_K" else raw[16:]
        out = []
        for sub in range(8):
            scale, low = scale_min(packed, sub)
            for j in range(32):
                q = qs[32 * (sub // 2) + j] >> (4 * (sub % 2)) & 15
                if name == "Q5_K":
                    q += 16 * (high[j] >> sub & 1)
                out.append(half(raw, 0) * scale * q - half(raw, 2) * low)
        return out
    assert name == "Q6_K"
    out = [0.0] * 256
    scales, d = struct.unpack_from("<16b", raw, 192), half(raw, 208)
    for part in range(2):
        ql, qh = raw[64 * part :], raw[128 + 32 * part :]
        for j in range(32):
            quarters = [ql[j] & 15, ql[j + 32] & 15, ql[j] >> 4, ql[j + 32] >> 4]
            for quarter, q in enumerate(quarters):
                value = (q | ((qh[j] >> 2 * quarter & 3) << 4)) - 32
                out[128 * part + 32 * quarter + j] = d * scales[8 * part + 2 * quarter + j // 16] * value
    return out


@pytest.mark.parametrize("name", [name for name in QUANTIZATIONS if "F" not in name])
def test_dequantizing_is_ggml_s_definition(name: str, tmp_path: Path) -> None:
    """Against a scalar decoder written from ggml-quants.c; the two may differ by float32 rounding of terms only."""
    rows = blocks_of(name)
    found = read_gguf(write(tmp_path / "a.gguf", {"t": (name, rows)})).tensors["t"].dequantize()
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    for row, values in zip(rows, found, strict=True):
        raw = row.tobytes()
        expected = np.array([v for at in range(0, len(raw), size) for v in decode(name, raw[at : at + size])])
        # Each value is a sum of at most two terms, each rounded: 3 half-ulps of the largest term.
        assert np.abs(values - expected).max() <= 3 * 2**-24 * np.abs(expected).max() * 4


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_widened_exactly(name: str, tmp_path: Path) -> None:
    stored = blocks_of(name)
    found = read_gguf(write(tmp_path / "a.gguf", {"t": (name, stored)})).tensors["t"].dequantize()
    if name == "BF16":
        expected = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        expected = stored.view(np.float32 if name == "F32" else np.float16).astype(np.float32)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    """A file cut anywhere is an error of ours, in a moment, and never a shorter model."""
    path = everything(tmp_path / "a.gguf")
    whole = path.read_bytes()
    end = max(at for at in range(len(whole)) if whole[at])
    for cut in random.Random(0).sample(range(end), 150):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as caught:
            read_gguf(path)
        assert caught.value.file == str(path)


def test_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """400 files with changed header bytes, lengths and counts among them: read, or refused in one line."""
    chance = random.Random(1)
    path = write(tmp_path / "a.gguf", {"t": ("F32", blocks_of("F32"))})
    whole = path.read_bytes()
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[chance.randrange(min(len(whole), 500))] = chance.choice([0, 1, 8, 9, 127, 255])
        path.write_bytes(damaged)
        try:
            assert isinstance(read_gguf(path), GgufFile)
        except CheckpointError:
            refused += 1
    assert refused > 100


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


CASES = {
    "no GGUF": (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "version": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless keys": (header(keys=1 << 60), "truncated"),
    "endless strings": (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60), "claims"),
    "endless numbers": (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60), "truncated"),
    "nested array": (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1), "unsupported value type"),
    "unknown value": (header(keys=1) + text(b"a") + struct.pack("<I", 77), "unknown value type 77"),
    "key twice": (header(keys=2) + 2 * (text(b"a") + struct.pack("<IB", 7, 1)), "twice"),
    "name not UTF-8": (header(keys=1) + text(b"\xff") + struct.pack("<IB", 7, 1), "not UTF-8"),
    "alignment": (header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 3), "power of two"),
    "tensor twice": (header(tensors=2) + info(b"t", [1], 0, 0) + info(b"t", [1], 0, 32) + bytes(99), "twice"),
    "overlap": (header(tensors=2) + info(b"t", [9], 0, 0) + info(b"u", [1], 0, 32) + bytes(99), "inside the tensor"),
    "beyond": (header(tensors=1) + info(b"t", [999], 0, 0) + bytes(99), "beyond the file"),
    "ragged row": (header(tensors=1) + info(b"t", [33], 8, 0) + bytes(99), "blocks of 32"),
    "no dimensions": (header(tensors=1) + info(b"t", [], 0, 0) + bytes(99), "0 dimensions"),
    "unread type": (header(tensors=1) + info(b"t", [256], 10, 0) + bytes(999), "stored as Q2_K"),
    "unknown type": (header(tensors=1) + info(b"t", [256], 999, 0) + bytes(999), "stored as type 999"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lying_file_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    content, message = CASES[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert caught.value.file == str(path)
    assert caught.value.remedy

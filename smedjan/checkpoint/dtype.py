"""Float conversions on bytes, equal to torch's to the bit, and the search for NaN and infinity.

Narrowing rounds to nearest, ties to even. bfloat16 is the upper half of a float32, handled as its uint16 bit pattern.
"""

from __future__ import annotations

import numpy as np

from smedjan.checkpoint.raw import RawTensor

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that weights may have."""

_CHUNK = 1 << 20
_NUMPY: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
_EXPONENT: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}


def _flat(tensor: RawTensor, kind: type[np.generic]) -> np.ndarray:
    return np.frombuffer(tensor.data, dtype=kind, count=tensor.numel)


def first_nonfinite(tensor: RawTensor) -> int | None:
    """The flat index of the first NaN or infinity of a float tensor, or None."""
    kind, mask = _EXPONENT[tensor.dtype]
    bits = _flat(tensor, kind)
    for start in range(0, bits.size, _CHUNK):
        # Every exponent bit set: infinity, or NaN.
        bad = (bits[start : start + _CHUNK] & kind(mask)) == kind(mask)
        if bad.any():
            return start + int(bad.argmax())
    return None


def to_float32(tensor: RawTensor) -> np.ndarray:
    """The values as a flat float32 array (exact but for float64, which is rounded)."""
    if tensor.dtype == "bfloat16":
        return (_flat(tensor, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return _flat(tensor, _NUMPY[tensor.dtype]).astype(np.float32, copy=False)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Adding just under half an ulp, plus one where the kept part is odd, rounds to nearest even by carry.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def convert(tensor: RawTensor, dtype: str) -> RawTensor:
    """`tensor` in another float dtype. A value beyond the range of `dtype` becomes infinity."""
    assert tensor.dtype in FLOATS, f"{tensor.dtype} is no float"
    assert dtype in FLOATS, f"{dtype} is no float"
    if dtype == tensor.dtype:
        return tensor
    out = np.empty(tensor.numel, np.uint16 if dtype == "bfloat16" else _NUMPY[dtype])
    size = tensor.nbytes // tensor.numel if tensor.numel else 1
    for start in range(0, tensor.numel, _CHUNK):
        stop = min(start + _CHUNK, tensor.numel)
        part = RawTensor(dtype=tensor.dtype, shape=(stop - start,), data=tensor.data[start * size : stop * size])
        if dtype == "bfloat16":
            out[start:stop] = _bfloat16_bits(to_float32(part))
        else:
            source = _flat(part, np.float64) if part.dtype == "float64" else to_float32(part)
            with np.errstate(over="ignore", invalid="ignore"):
                out[start:stop] = source
    return RawTensor(dtype=dtype, shape=tensor.shape, data=out.view(np.uint8).data)

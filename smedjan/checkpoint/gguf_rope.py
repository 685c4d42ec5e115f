"""Rotary positions in a GGUF file, both ways: keys under `rope.`, and tensors of divisors.

    linear    scaling.type, scaling.factor
    yarn      the same, original_context_length; cos and sin are multiplied by attn_factor (0.1 ln factor + 1)
    llama3    rope_freqs.weight, the divisor of each inverse frequency
    longrope  rope_factors_short.weight, rope_factors_long.weight, attn_factor, original_context_length

llama.cpp ignores keys that it does not know: `low_freq_factor`, `high_freq_factor` and `yarn_attn_factor` are there for
who reads the file back. Without them a llama3 scaling is one of Meta's, or refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.gguf_file import GgufTensor
from smedjan.errors import CheckpointError
from smedjan.models.config import ConfigReader
from smedjan.models.rope import RopeConfig

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_KINDS = ("none", "linear", "yarn", "longrope")


def decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """The keys of a scaling, without the architecture's prefix."""
    keys: dict[str, Any] = {}
    kind, original = rope.rope_type, rope.original_max_position_embeddings
    if kind in ("linear", "yarn"):
        keys.update({"rope.scaling.type": kind, "rope.scaling.factor": rope.factor})
    if kind in ("yarn", "llama3", "longrope"):
        keys["rope.scaling.original_context_length"] = original
    if kind == "yarn":
        assert rope.factor is not None
        keys["rope.scaling.attn_factor"] = rope.attention_scaling / _yarn_attention(rope.factor)
        if rope.attention_scaling != _yarn_attention(rope.factor):
            keys["rope.scaling.yarn_attn_factor"] = rope.attention_scaling
    if kind == "llama3":
        keys["rope.scaling.low_freq_factor"] = rope.low_freq_factor
        keys["rope.scaling.high_freq_factor"] = rope.high_freq_factor
    if kind == "longrope":
        keys["rope.scaling.type"] = kind
        keys["rope.scaling.attn_factor"] = rope.attention_scaling
    return keys


def rope_tensors(rope: RopeConfig, head_dim: int) -> dict[str, np.ndarray]:
    """The tensors of a scaling, float32 [rotary dims / 2] each."""
    dim = rope.rotary_dim(head_dim)
    if rope.rope_type == "llama3":
        return {FREQS: llama3_divisors(rope, dim)}
    if rope.rope_type == "longrope":
        return {LONG: np.array(rope.long_factor, np.float32), SHORT: np.array(rope.short_factor, np.float32)}
    return {}


def _yarn_attention(factor: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def read_scaling(
    reader: ConfigReader, tensors: dict[str, GgufTensor], *, head_dim: int, rotary_dim: int, context: int, file: Path
) -> RopeConfig:
    """The scaling of the file's (global) layers."""
    theta = decimal(reader.number("rope.freq_base", 10000.0, open_low=True))
    kind = reader.choice("rope.scaling.type", _KINDS, "none")
    factor = decimal(reader.number("rope.scaling.factor", 1.0))
    # What llama.cpp wrote for `linear` before it had a type.
    legacy = decimal(reader.number("rope.scale_linear", 1.0, open_low=True))
    original = reader.optional_integer("rope.scaling.original_context_length", low=1)
    attention = decimal(reader.number("rope.scaling.attn_factor", 1.0, open_low=True))
    given = _optional(reader, "yarn_attn_factor")
    low, high = (_optional(reader, f"{name}_freq_factor") for name in ("low", "high"))
    fast, slow = (_optional(reader, f"yarn_beta_{name}") for name in ("fast", "slow"))
    reader.only("rope.scaling.yarn_ext_factor", 1.0, remedy="only the whole of yarn is supported")
    reader.inert("rope.scaling.finetuned")
    base: dict[str, Any] = {"rope_theta": theta, "partial_rotary_factor": rotary_dim / head_dim}
    if FREQS in tensors:
        if kind in ("linear", "yarn") or legacy != 1.0:
            raise _foreign(file)
        return _llama3(tensors[FREQS], base, rotary_dim, original, low, high, file)
    # llama.cpp's converter names no type for Phi-3's, only its tensors.
    if kind == "longrope" or (kind == "none" and LONG in tensors):
        return _longrope(reader, tensors, base, rotary_dim // 2, context, original or context, attention)
    if kind == "yarn":
        if factor <= 0.0:
            raise reader.error(f"is {factor:g}", "rope.scaling.factor", "yarn needs one above 0")
        if given is None and attention != 1.0:
            given = attention * _yarn_attention(factor)
        return RopeConfig(
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=original or context,
            attention_factor=None if given is None else decimal(given),
            beta_fast=fast,
            beta_slow=slow,
            truncate=True,
            **base,
        )
    factor = factor if kind == "linear" else legacy
    if attention != 1.0:
        raise reader.error(f"is {attention:g}", "rope.scaling.attn_factor", "only yarn and longrope scale attention")
    if factor in (0.0, 1.0):
        return RopeConfig(**base)
    return RopeConfig(rope_type="linear", factor=factor, **base)


def _optional(reader: ConfigReader, name: str) -> float | None:
    value = reader.optional_number(f"rope.scaling.{name}", open_low=True)
    return None if value is None else decimal(value)


def _longrope(
    reader: ConfigReader,
    tensors: dict[str, GgufTensor],
    base: dict[str, Any],
    count: int,
    context: int,
    original: int,
    attention: float,
) -> RopeConfig:
    made: dict[str, Any] = {
        "rope_type": "longrope",
        "factor": context / original,
        "original_max_position_embeddings": original,
        **base,
    }
    for field, name in (("short_factor", SHORT), ("long_factor", LONG)):
        if name not in tensors or tensors[name].shape != (count,):
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise CheckpointError(
                f"is {found}", file=reader.file, field=name, remedy=f"longrope needs {count} factors: convert it again"
            )
        made[field] = tuple(decimal(value) for value in tensors[name].dequantize())
    plain = RopeConfig(**made)
    if math.isclose(plain.attention_scaling, attention, rel_tol=1e-6):
        return plain
    return RopeConfig(attention_factor=attention, **made)


def llama3_divisors(rope: RopeConfig, rotary_dim: int) -> np.ndarray:
    """What `rope_freqs.weight` holds for a llama3 scaling: the divisor of each inverse frequency, float32 [D / 2]."""
    original, factor = rope.original_max_position_embeddings, rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert original is not None
    assert factor is not None
    assert low is not None
    assert high is not None
    divisors = []
    for index in range(0, rotary_dim, 2):
        wavelength = 2 * math.pi * rope.rope_theta ** (index / rotary_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def _foreign(file: Path) -> CheckpointError:
    return CheckpointError(
        "its divisors are not those of Llama 3.1 to 3.3",
        file=file,
        field=FREQS,
        remedy="import the model's safetensors instead, whose config.json says how it scales",
    )


def _llama3(
    tensor: GgufTensor,
    base: dict[str, Any],
    rotary_dim: int,
    original: int | None,
    low: float | None,
    high: float | None,
    file: Path,
) -> RopeConfig:
    """The llama3 scaling with these divisors: the factor is the largest, the rest is said or Meta's."""
    divisors = tensor.dequantize().ravel()
    if low is None or high is None or original is None:
        original, low, high = 8192, 1.0, 4.0
    if divisors.shape != (rotary_dim // 2,) or not divisors.max() > 1:
        raise _foreign(file)
    rope = RopeConfig(
        rope_type="llama3",
        factor=decimal(float(divisors.max())),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
        **base,
    )
    # The converter computes in float32: a few ulps apart, while another parameter moves a divisor by percents.
    if low >= high or not np.allclose(divisors, llama3_divisors(rope, rotary_dim), rtol=1e-4, atol=0):
        raise _foreign(file)
    return rope

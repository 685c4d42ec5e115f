"""Scalings of rotary positions, written and read back; the divisors of Llama 3 are transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smedjan.checkpoint.gguf_file import GgufTensor
from smedjan.checkpoint.gguf_rope import FREQS, LONG, SHORT, read_scaling, rope_keys, rope_tensors
from smedjan.errors import SmedjanError
from smedjan.models.config import ConfigReader
from smedjan.models.rope import RopeConfig

FACTORS = tuple(1.0 + index / 8 for index in range(8))
ROPES = {
    "default": RopeConfig(rope_theta=5e5),
    "partial": RopeConfig(partial_rotary_factor=0.25),
    "linear": RopeConfig(rope_type="linear", factor=4.0),
    "yarn": RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, truncate=True),
    "yarn, attention scaled": RopeConfig(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2, truncate=True
    ),
    "llama3": RopeConfig(
        rope_type="llama3",
        rope_theta=5e5,
        factor=32.0,
        low_freq_factor=1.5,
        high_freq_factor=3.0,
        original_max_position_embeddings=4096,
    ),
    "longrope": RopeConfig(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=64,
        short_factor=FACTORS,
        long_factor=tuple(2 * factor for factor in FACTORS),
    ),
    "longrope, attention scaled": RopeConfig(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=64,
        short_factor=FACTORS,
        long_factor=FACTORS,
        attention_factor=1.19,
    ),
}


def stored(name: str, values: np.ndarray) -> GgufTensor:
    return GgufTensor(
        name=name, quantization="F32", shape=values.shape, data=memoryview(values.astype("<f4")).cast("B")
    )


def read(keys: dict[str, object], tensors: dict[str, np.ndarray], rotary_dim: int = 16) -> RopeConfig:
    """As a file gives them: floats are float32."""
    data = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in keys.items()}
    reader = ConfigReader(data, Path("x.gguf"))
    made = read_scaling(
        reader,
        {name: stored(name, values) for name, values in tensors.items()},
        head_dim=16,
        rotary_dim=rotary_dim,
        context=256,
        file=Path("x.gguf"),
    )
    reader.finish()
    return made


@pytest.mark.parametrize("name", ROPES)
def test_what_is_written_is_read(name: str) -> None:
    rope = ROPES[name]
    keys = {"rope.freq_base": rope.rope_theta, **rope_keys(rope)}
    assert read(keys, rope_tensors(rope, 16), rope.rotary_dim(16)) == rope


def test_phi3_files_of_llama_cpp_name_no_type() -> None:
    rope = ROPES["longrope"]
    keys = {key: value for key, value in rope_keys(rope).items() if key != "rope.scaling.type"}
    assert read(keys, rope_tensors(rope, 16)) == rope


def test_llama3_divisors_are_transformers() -> None:
    rope = ROPES["llama3"]
    scaling = {key: value for key, value in vars(rope).items() if value is not None and key != "partial_rotary_factor"}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters=scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 5e5 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    ours = rope_tensors(rope, 128)[FREQS]
    assert ours.max() == 32.0
    assert len(set(ours.tolist())) > 3
    assert np.allclose(ours, (plain / theirs.double()).numpy(), rtol=2.0**-20, atol=0)


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({}, {FREQS: np.linspace(1, 3, 8)}, "its divisors are not those of Llama 3.1 to 3.3"),
        ({}, {FREQS: np.ones(8)}, "its divisors"),
        ({"rope.scaling.type": "linear"}, {FREQS: np.linspace(1, 8, 8)}, "its divisors"),
        ({"rope.scaling.type": "longrope"}, {SHORT: np.ones(8)}, f"{LONG}: is missing; longrope needs 8 factors"),
        ({"rope.scaling.type": "longrope"}, {SHORT: np.ones(7), LONG: np.ones(8)}, f"{SHORT}: is [7]"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0}, {}, "rope.scaling.factor: is 0; yarn needs"),
        ({"rope.scaling.attn_factor": 2.0}, {}, "only yarn and longrope scale attention"),
    ],
)
def test_what_is_no_scaling_is_refused(keys: dict[str, object], tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(SmedjanError) as caught:
        read(keys, tensors)
    assert message in str(caught.value)

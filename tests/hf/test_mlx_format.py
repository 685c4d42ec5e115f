"""Directories that mlx-lm quantised: their logits on every backend, layers with settings of their own, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import smedjan
from smedjan.backends.mlx_metal import quantized as rules
from smedjan.errors import SmedjanError
from smedjan.hf.import_model import import_model
from smedjan.ops.quantized import AFFINE_BITS, Affine
from tests.conftest import assert_bits
from tests.hf.damage import INDEX, WEIGHTS, put, put_json
from tests.hf.mlx_peer import IDS, MODELS, dequantised, logits_of, make_imported, mlx_logits, mlx_quantized
from tests.tolerances import assert_near


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_what_mlx_lm_quantised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and mlx-lm's within the bound of the weights that the codes stand for; the exact backend has their bits."""
    directory = mlx_quantized(make_imported(name, tmp_path / "plain"), tmp_path / "quantised")
    plain, wide = dequantised(directory, tmp_path / "dequantised")
    assert_near(f"mlx-lm, {name}", mlx_logits(directory), wide, plain)
    assert_bits(logits_of(directory, "torch_reference"), plain, name)
    for backend in ("cpu_native", "mlx_metal"):
        assert_near(f"{backend}, {name}", logits_of(directory, backend), wide, plain)
    monkeypatch.setattr(rules, "multiplies_codes", lambda node: True)
    assert_near(f"mlx.quantized_matmul, {name}", logits_of(directory, "mlx_metal"), wide, plain)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_each_width_in_bfloat16(bits: int, tmp_path: Path) -> None:
    source = make_imported("llama, tied and biased", tmp_path / "plain", "bfloat16")
    directory = mlx_quantized(source, tmp_path / "quantised", bits=bits, group_size=64)
    plain, _ = dequantised(directory, tmp_path / "dequantised")
    assert_bits(logits_of(directory, "torch_reference"), plain, f"{bits} bits")
    model = smedjan.load(directory, backend="mlx_metal")
    assert model.session.dtype == "bfloat16"
    assert model.session.affine[model.session.config.head] == Affine(bits=bits, group_size=64)


def test_codes_are_held_and_cached_decoding_reads_them(tmp_path: Path) -> None:
    directory = mlx_quantized(make_imported("llama", tmp_path / "plain"), tmp_path / "quantised")
    import_model(directory, tmp_path / "dequantised")
    texts = {}
    for backend in ("torch_reference", "cpu_native", "mlx_metal"):
        model = smedjan.load(directory, backend=backend)
        config = model.session.config
        assert {*config.linear_weights(), config.embedding, config.head} == set(model.session.affine)
        assert not set(model.session.affine) & set(model.session.parameters)
        assert set(model.session.specs()) == set(model.session.parameters)
        other = smedjan.load(tmp_path / "dequantised", backend=backend)
        texts[backend] = [list(each.generate(IDS[0], max_new_tokens=8)) for each in (model, other)]
    assert len({tuple(text) for pair in texts.values() for text in pair}) == 1


def test_layers_with_settings_of_their_own(tmp_path: Path) -> None:
    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if "down_proj" in path:
            return {"group_size": 64, "bits": 6, "mode": "affine"}
        if "layers.1.self_attn" in path:
            return False
        return {"group_size": 32, "bits": 3} if path == "lm_head" else "o_proj" not in path

    source = make_imported("llama", tmp_path / "plain")
    directory = mlx_quantized(source, tmp_path / "quantised", quant_predicate=predicate)
    plain, wide = dequantised(directory, tmp_path / "dequantised")
    assert_near("mlx-lm", mlx_logits(directory), wide, plain)
    assert_bits(logits_of(directory, "torch_reference"), plain, "overrides")
    held = smedjan.load(directory, backend="mlx_metal").session.affine
    assert held["model.layers.1.mlp.down_proj.weight"] == Affine(bits=6, group_size=64)
    assert held["lm_head.weight"] == Affine(bits=3, group_size=32)
    assert held["model.layers.0.self_attn.q_proj.weight"] == Affine(bits=4, group_size=32)
    assert "model.layers.1.self_attn.q_proj.weight" not in held
    assert "model.layers.0.self_attn.o_proj.weight" not in held
    config = json.loads((directory / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key]["model.layers.0.self_attn.o_proj"] = False
    put_json(directory / "config.json", config)
    assert_bits(logits_of(directory, "torch_reference"), plain, "false, said")


def test_widened_to_float32(tmp_path: Path) -> None:
    """Scales are widened, then codes: no rounding to bfloat16 is left in the weights, on any backend."""
    source = make_imported("llama", tmp_path / "plain", "bfloat16")
    directory = mlx_quantized(source, tmp_path / "quantised", bits=8)
    plain = logits_of(directory, "torch_reference", dtype="float32")
    for backend in ("cpu_native", "mlx_metal"):
        assert float((logits_of(directory, backend, dtype="float32") - plain).norm()) < 1e-5 * float(plain.norm())


def test_no_gradient_of_codes_and_no_copy_of_other_bits(tmp_path: Path) -> None:
    directory = mlx_quantized(make_imported("llama", tmp_path / "plain"), tmp_path / "quantised")
    model = smedjan.load(directory, backend="torch_reference")
    _, grads = model.loss_and_grads({"input_ids": IDS, "labels": IDS})
    assert set(grads) == {name for name in model.session.parameters if "norm" in name}
    assert all(np.abs(grad).max() > 0 for grad in grads.values())
    for name in ("lm_head.weight", "lm_head.weight.scales"):
        with pytest.raises(SmedjanError, match="has no gradient"):
            model.loss_and_grads({"input_ids": IDS, "labels": IDS}, wrt=[name])
    with pytest.raises(SmedjanError, match="in few bits already"):
        smedjan.load(directory, backend="torch_reference", quantize="int8")
    with pytest.raises(SmedjanError, match="export --to mlx"):
        model.save(tmp_path / "saved")


# damage

Q = "model.layers.0.self_attn.q_proj"


def settings(**changes: Any) -> Callable[[Path], None]:
    """`quantization` changed, and its copy with it; None drops a key."""

    def apply(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        said = {key: value for key, value in {**config["quantization"], **changes}.items() if value is not None}
        put_json(directory / "config.json", {**config, "quantization": said, "quantization_config": said})

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        state = safetensors.torch.load_file(directory / WEIGHTS)
        change(state)
        put(directory / WEIGHTS, safetensors.torch.save(state, metadata={"format": "mlx"}))
        (directory / INDEX).unlink(missing_ok=True)

    return apply


def other_copy(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    put_json(directory / "config.json", {**config, "quantization_config": {"group_size": 64, "bits": 4}})


def whole(state: dict[str, torch.Tensor]) -> None:
    del state[f"{Q}.scales"], state[f"{Q}.biases"]
    state[f"{Q}.weight"] = torch.zeros(64, 64)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "mxfp4": (settings(mode="mxfp4", group_size=32), "config.json", "quantization.mode: is 'mxfp4'"),
    "nvfp4": (settings(mode="nvfp4", group_size=16), "config.json", "quantization.mode: is 'nvfp4'"),
    "no bits": (settings(bits=None), "config.json", "quantization.bits: is missing"),
    "bits": (settings(bits=7), "config.json", "quantization.bits: is 7"),
    "true bits": (settings(bits=True), "config.json", "quantization.bits: is True"),
    "group": (settings(group_size=16), "config.json", "quantization.group_size: is 16"),
    "other bits": (settings(bits=8), WEIGHTS, "of 8 bits in groups of 32"),
    "other group": (settings(group_size=64), WEIGHTS, "of 4 bits in groups of 64"),
    "other width": (settings(group_size=128), WEIGHTS, "in groups of 128"),
    "unknown key": (settings(grup_size=32), "config.json", "did you mean 'group_size'"),
    "unknown layer": (settings(**{"model.layers.9.q_proj": False}), "config.json", "no such layer"),
    "unknown setting": (settings(**{Q: {"bits": 4, "group_size": 32, "global_scale": True}}), "config.json", Q),
    "layer of a number": (settings(**{Q: 4}), "config.json", f"quantization.{Q}: is 4"),
    "layer in mxfp8": (settings(**{Q: {"bits": 8, "group_size": 32, "mode": "mxfp8"}}), "config.json", "is 'mxfp8'"),
    "layer said whole": (settings(**{Q: False}), WEIGHTS, "says it is not"),
    "layer is whole": (tensors(whole), WEIGHTS, ""),
    "another copy": (other_copy, "config.json", "quantization_config"),
    "no scales": (tensors(lambda state: state.pop(f"{Q}.scales")), WEIGHTS, f"{Q}.scales: the tensor is missing"),
    "no biases": (tensors(lambda state: state.pop(f"{Q}.biases")), WEIGHTS, f"{Q}.biases: the tensor is missing"),
    "fewer scales": (tensors(lambda s: s.update({f"{Q}.scales": s[f"{Q}.scales"][:, :1].clone()})), WEIGHTS, "scales"),
    "byte scales": (
        tensors(lambda s: s.update({f"{Q}.scales": s[f"{Q}.scales"].to(torch.uint8)})),
        *(WEIGHTS, "not the affine format"),
    ),
    "scales left over": (
        tensors(lambda s: s.update({"model.norm.scales": torch.ones(2)})),
        *(WEIGHTS, "model.norm.scales"),
    ),
    "signed codes": (
        tensors(lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].view(torch.int32)})),
        *(WEIGHTS, "is int32"),
    ),
    "infinite scale": (tensors(lambda s: s[f"{Q}.scales"].fill_(float("inf"))), WEIGHTS, "NaN or infinity"),
    "not an object": (
        lambda directory: put_json(
            directory / "config.json",
            {**json.loads((directory / "config.json").read_text()), "quantization": 4, "quantization_config": 4},
        ),
        *("config.json", "quantization: is 4"),
    ),
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mlx")
    return mlx_quantized(make_imported("llama", root / "plain"), root / "quantised")


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_names_file_and_field(case: str, quantised: Path, tmp_path: Path) -> None:
    apply, file, said = DAMAGE[case]
    directory = tmp_path / "model"
    directory.mkdir()
    for path in quantised.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    apply(directory)
    if not said:  # what mlx-lm writes of a layer that its predicate left alone
        import_model(directory, tmp_path / "out")
        return
    with pytest.raises(SmedjanError) as raised:
        import_model(directory, tmp_path / "out")
    text = str(raised.value)
    assert said in text, text
    assert file in text
    assert "\n" not in text
    assert raised.value.remedy
    assert not (tmp_path / "out").exists()
    if case != "infinite scale":
        with pytest.raises(SmedjanError):
            smedjan.load(directory, backend="torch_reference")


def test_an_index_of_a_single_file_is_read(quantised: Path, tmp_path: Path) -> None:
    """mlx-lm writes one; beside shards a single file is still refused."""
    assert (quantised / INDEX).is_file()
    assert (quantised / WEIGHTS).is_file()
    for path in quantised.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    put_json(tmp_path / INDEX, index)
    with pytest.raises(SmedjanError, match=r"both model\.safetensors"):
        import_model(tmp_path, tmp_path / "out")

"""Every family that mlx-lm has, quantised by mlx-lm: its logits and ours, and the first gradients of QLoRA on it.

The truth is transformers' model of the weights that the codes stand for, in float64. Logits are held by `assert_near`
of tests/tolerances.py, the gradients of all adapters by it as one vector: one tensor's error is a single draw, and
bounds nothing where the plain computation was lucky.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlx_lm.utils import load_model, save_config, save_model
from safetensors.torch import load_file, save_file

import smedjan
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.errors import SmedjanError
from smedjan.hf.export_mlx import export_mlx
from smedjan.hf.export_mlx_lm import export_adapter
from smedjan.hf.import_model import import_model
from smedjan.hf.load import open_model, open_session
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from tests.backends.cpu_native.fused_cases import Float64
from tests.conftest import assert_bits, make_batch
from tests.families import CASES, make_model
from tests.hf.mlx_peer import (
    FAMILIES,
    IDS,
    adapted_logits,
    dequantised,
    logits_of,
    make_imported,
    mlx_adapter,
    mlx_logits,
    mlx_quantized,
)
from tests.tolerances import assert_near

OTHERWISE = {"gemma": "exact GELU alone"}
"""Where mlx-lm's logits are of another model, whatever its config.json says."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_first_gradients_of_what_mlx_lm_quantised(family: str, tmp_path: Path) -> None:
    directory = mlx_quantized(make_imported(family, tmp_path / "plain"), tmp_path / "quantised")
    plain, wide = dequantised(directory, tmp_path / "dequantised")
    theirs = mlx_logits(directory)
    if family in OTHERWISE:
        with pytest.raises(AssertionError, match="bound"):
            assert_near(family, theirs, wide, plain)
    else:
        assert_near(f"mlx-lm, {family}", theirs, wide, plain)
    assert_bits(logits_of(directory, "torch_reference"), plain, family)
    assert_near(family, logits_of(directory, "mlx_metal"), wide, plain)
    found, truth, reference = gradients(directory)
    assert float(truth.abs().max()) > 0
    assert_near(f"gradients of {family}", found, truth, reference)


def gradients(directory: Path) -> list[torch.Tensor]:
    """Of all adapters, beside every linear layer of the blocks: on MLX, in float64, and torch_reference's."""
    arrays, files = backend("torch_reference"), open_model(directory)
    lora = Lora(rank=3, alpha=6.0, dropout=0.0, targets=files.config.linear_layers())
    generator = torch.Generator().manual_seed(4)
    adapters = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in lora.shapes(files.config.parameter_shapes()).items()
    }
    sessions = [open_session(files, backend(on)) for on in ("mlx_metal", "torch_reference")]
    weights = {name: arrays.from_raw(convert(files.tensors[name], "float64")) for name in files.tensors}
    sessions.insert(1, Session(Float64(), files.config, weights, "float32"))
    made, batch = [], make_batch("right", seq=12)
    for session in sessions:
        wide = {
            name: array.double() if isinstance(session.backend, Float64) else array for name, array in adapters.items()
        }
        session.use(lora, {name: session.backend.from_raw(arrays.to_raw(array)) for name, array in wide.items()})
        _, grads = session.micro(batch, list(adapters), num_items=batch.trained_tokens)
        back = (arrays.from_raw(session.backend.to_raw(grads[name])) for name in adapters)
        made.append(torch.cat([array.reshape(-1) for array in back]))
    return made


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each == "gpt_neox" else pytest.mark.slow) for each in FAMILIES]
)
def test_adapters_there_and_back(family: str, tmp_path: Path) -> None:
    """mlx-lm's adapters of all linear layers: its logits and ours on MLX are within the bound of both in float64, and
    ours exported again is to mlx-lm the same to the bit. GPT-NeoX's, whose modules have other names there, also by
    whole names."""
    base = make_imported(family, tmp_path / "base")
    settings: dict[str, object] = {"rank": 4, "scale": 1.7, "dropout": 0.0}
    if family == "gpt_neox":
        settings["keys"] = ["model.h.1.attention.dense", "model.h.3.mlp.dense_h_to_4h", "model.embed_out"]
        check_adapter(family, base, tmp_path / "named", settings)
        del settings["keys"]
    check_adapter(family, base, tmp_path / "all", settings)


def check_adapter(family: str, base: Path, folder: Path, settings: dict[str, object]) -> None:
    folder.mkdir()
    adapter, theirs = mlx_adapter(base, folder / "adapter", settings, 4)
    plain = open_session(open_model(base), backend("torch_reference"), attention="eager", adapter=adapter)
    weights = {name: array.double() for name, array in plain.parameters.items()}
    wide = Session(Float64(), plain.config, weights, "float32", attention="eager", lora=plain.lora)
    batch = make_batch(seq=IDS.shape[1])
    batch.input_ids = IDS.numpy()
    reference, truth = plain.logits(batch), wide.logits(batch)
    assert_near(family, logits_of(base, "mlx_metal", adapter=adapter), truth, reference)
    assert float((truth - logits_of(base, "torch_reference")).norm()) > 1e-2 * float(truth.norm())
    if family not in OTHERWISE:
        assert_near(f"mlx-lm, {family}", theirs, truth, reference)
    export_adapter(base, folder / "again", adapter=adapter)
    before, after = (load_file(each / "adapters.safetensors") for each in (adapter, folder / "again"))
    assert set(before) == set(after)
    assert torch.equal(adapted_logits(base, folder / "again"), theirs)


def test_gpt_neox_by_mlx_lm_s_names(tmp_path: Path) -> None:
    """Its own directories say model.h and model.embed_out, whole or in few bits; ours have HF's names, and the scales
    of a head that is called embed_out there. All are one model."""
    source = make_imported("gpt_neox", tmp_path / "source")
    model, config = load_model(source, strict=True)
    save_model(tmp_path / "whole", model)
    save_config(config, tmp_path / "whole" / "config.json")
    assert {"model.embed_out.weight", "model.h.0.attention.dense.weight"} <= set(open_checkpoint(tmp_path / "whole"))
    assert_bits(logits_of(tmp_path / "whole", "torch_reference"), logits_of(source, "torch_reference"), "whole")

    def some(path: str, module: object) -> bool | dict[str, object]:
        return {"group_size": 64, "bits": 6} if path == "model.h.1.mlp.dense_h_to_4h" else "h.2" not in path

    theirs = mlx_quantized(source, tmp_path / "quantised", quant_predicate=some)
    plain, wide = dequantised(theirs, tmp_path / "dequantised")
    assert_near("mlx-lm", mlx_logits(theirs), wide, plain)
    assert_bits(logits_of(theirs, "torch_reference"), plain, "by module")
    held = smedjan.load(theirs, backend="mlx_metal").session.affine
    assert held["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"].bits == 6
    assert "gpt_neox.layers.2.mlp.dense_h_to_4h.weight" not in held
    export_mlx(source, tmp_path / "ours", bits=4, group_size=32)
    assert torch.equal(mlx_logits(tmp_path / "ours"), mlx_logits(mlx_quantized(source, tmp_path / "again")))
    assert_bits(
        logits_of(tmp_path / "ours", "torch_reference"), logits_of(tmp_path / "again", "torch_reference"), "in few bits"
    )


def test_gpt2_is_refused(tmp_path: Path) -> None:
    """mlx-lm reads it without `transformer.` before its names, and codes the transposes of its weights."""
    settings = {**CASES["gpt2"]["plain"], "n_embd": 64, "n_inner": 256, "n_head": 4}
    make_model("gpt2", settings).save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "plain")
    (weights,) = (tmp_path / "plain").glob("*.safetensors")
    save_file({name.removeprefix("transformer."): each for name, each in load_file(weights).items()}, weights)
    directory = mlx_quantized(tmp_path / "plain", tmp_path / "quantised")
    with pytest.raises(SmedjanError, match=r"config\.json: quantization: gpt2 has its weights transposed") as raised:
        open_model(directory)
    assert raised.value.remedy

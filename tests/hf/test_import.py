"""An import is a checked copy that transformers and mlx-lm load unchanged, or one line and nothing on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer

from smedjan.checkpoint.raw import PART
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.errors import CheckpointError, ConfigError, SmedjanError
from smedjan.hf.import_model import import_model
from smedjan.hf.tokenizer import load_tokenizer
from tests.hf.importing import load, refused, sha256_of

Make = Callable[..., Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = safetensors.torch.load_file(directory / WEIGHTS)
    change(state)
    safetensors.torch.save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"head_dim": 32, "attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biases"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_copy_is_the_same_model_to_transformers(
    changes: dict, dtype: torch.dtype, model_directory: Make, tmp_path: Path
) -> None:
    """Same parameters to the bit, same dtype, same logits, same tokenizer; nothing missing or unexpected."""
    source = model_directory(dtype=dtype, **changes)
    report = import_model(source, tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), load(source)
    assert ours.dtype == theirs.dtype == dtype
    assert all(torch.equal(left, right) for left, right in zip(ours.parameters(), theirs.parameters(), strict=True))
    batch = torch.arange(30).reshape(2, 15)
    assert torch.equal(ours(batch).logits, theirs(batch).logits)
    left, right = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(source)
    assert left("the dog").input_ids == right("the dog").input_ids == load_tokenizer(tmp_path / "out").encode("the dog")
    assert left.chat_template == right.chat_template == load_tokenizer(tmp_path / "out").chat_template
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert report.model_type == "llama"
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert report.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if "tie_word_embeddings" in changes else {})
    assert report.source_quantization is None
    assert {file["path"] for file in report.files} >= {"config.json", WEIGHTS, "tokenizer.json"}
    assert all(sha256_of(tmp_path / "out" / file["path"]) == file["sha256"] for file in report.files)
    assert {file["path"] for file in report.sources} == {path.name for path in source.iterdir()}
    assert all(sha256_of(source / file["path"]) == file["sha256"] for file in report.sources)


def test_the_copy_is_the_same_model_to_mlx_lm(model_directory: Make, tmp_path: Path) -> None:
    """llama3 positions, tied head: what mlx-lm takes from the older spelling, and ties by default."""
    import mlx_lm

    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    import mlx.core as mx

    for name, tied in (("a", True), ("b", False)):
        source = model_directory(name, tie_word_embeddings=tied, rope_parameters=rope)
        import_model(source, tmp_path / f"out-{name}")
        model, _ = mlx_lm.load(str(tmp_path / f"out-{name}"))
        batch = torch.arange(60).reshape(1, 60)
        with torch.no_grad():
            expected = load(source)(batch).logits
        found = torch.tensor(model(mx.array(batch.numpy())).tolist())
        # Float32 sums in another order: rounding only, where another rope would move the logits by their own size.
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion_is_torch_s_and_is_said(
    target: str, stored: torch.dtype, model_directory: Make, tmp_path: Path
) -> None:
    source = model_directory(dtype=stored)
    report = import_model(source, tmp_path / "out", dtype=target)
    expected = safetensors.torch.load_file(source / WEIGHTS)
    found = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[name], expected[name].to(getattr(torch, target))) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == target
    assert any("converted" in note for note in report.notes) == (stored != getattr(torch, target))


def test_a_sharded_source_is_read(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    model = load(source)
    model.save_pretrained(source, max_shard_size="50KB")
    (source / WEIGHTS).unlink(missing_ok=True)
    assert (source / INDEX).is_file()
    import_model(source, tmp_path / "out")
    again = load(tmp_path / "out")
    assert all(torch.equal(left, right) for left, right in zip(again.parameters(), model.parameters(), strict=True))


def test_config_spells_rope_twice_and_drops_what_is_not_the_model_s(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    edit_config(source, _name_or_path="/somewhere/else", torch_dtype="float32", dtype=..., novelty=3, use_cache=False)
    report = import_model(source, tmp_path / "out", ignore_keys=["novelty"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert not {"novelty", "_name_or_path", "torch_dtype"} & set(config)
    assert config["use_cache"] is False
    assert any("novelty" in note for note in report.notes)
    import_model(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_old_checkpoints_position_buffers_are_ignored_and_said(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    edit_weights(source, lambda state: state.update({name: torch.ones(8) for name in names}))
    report = import_model(source, tmp_path / "out")
    assert report.unexpected == tuple(names)
    assert any("buffers" in note and names[0] in note for note in report.notes)
    assert not set(names) & set(open_checkpoint(tmp_path / "out"))


def test_a_tied_head_is_dropped_only_where_it_is_the_embedding(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory(tie_word_embeddings=True)
    edit_weights(source, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    report = import_model(source, tmp_path / "out")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out")
    assert any("dropped lm_head.weight" in note for note in report.notes)
    edit_weights(source, lambda state: state["lm_head.weight"][3, 4].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs .* set tie_word_embeddings to false"):
        import_model(source, tmp_path / "other")


def test_dtypes_that_disagree(model_directory: Make, tmp_path: Path) -> None:
    """A config that says another dtype is noted; tensors of two dtypes need the user's word."""
    source = model_directory()
    edit_config(source, dtype="bfloat16")
    assert import_model(source, tmp_path / "a").dtype == "float32"
    edit_weights(source, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].bfloat16()}))
    with pytest.raises(CheckpointError, match=r"20 in float32, 1 in bfloat16; choose one with --dtype"):
        import_model(source, tmp_path / "b")
    assert import_model(source, tmp_path / "b", dtype="float32").dtype == "float32"


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state["model.layers.1.mlp.up_proj.weight"].__setitem__((7, 3), value)


Q = "model.layers.0.self_attn.q_proj.weight"
WEIGHT_ERRORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "missing": (lambda state: state.pop(Q), Q, "the tensor is missing"),
    "two missing": (lambda state: (state.pop(Q), state.pop("model.norm.weight")), Q, "and 1 more"),
    "no head": (lambda state: state.pop("lm_head.weight"), "lm_head.weight", "set tie_word_embeddings to true"),
    "extra": (lambda state: state.update({Q + "s": torch.ones(2)}), Q + "s", f"the nearest that it has is {Q}"),
    "bias": (lambda state: state.update({"lm_head.bias": torch.ones(300)}), "lm_head.bias", "no such tensor"),
    "shape": (lambda state: state.update({Q: torch.ones(64, 32)}), Q, "has shape [64, 32], config.json says [64, 64]"),
    "integers": (lambda state: state.update({Q: torch.ones(64, 64, dtype=torch.int8)}), Q, "stored as int8"),
    "NaN": (poison(float("nan")), "model.layers.1.mlp.up_proj.weight", "holds NaN or infinity (element 451)"),
    "infinity": (poison(float("-inf")), "model.layers.1.mlp.up_proj.weight", "holds NaN or infinity (element 451)"),
}


@pytest.mark.parametrize("case", WEIGHT_ERRORS)
def test_wrong_weights_are_one_line_that_names_tensor_and_file(
    case: str, model_directory: Make, tmp_path: Path
) -> None:
    change, field, message = WEIGHT_ERRORS[case]
    source = model_directory()
    edit_weights(source, change)
    error = refused(source, tmp_path / "out")
    assert error.field == field
    assert error.file is not None
    assert error.file.startswith(str(source))
    assert message in str(error)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_bad_value_in_one_of_many_shards_stops_them_all(value: float, model_directory: Make, tmp_path: Path) -> None:
    """The second part of a tensor that is copied in parts: the element is counted from the tensor's beginning."""
    source = model_directory(hidden_size=64, intermediate_size=20_000)
    edit_weights(source, lambda state: state["model.layers.1.mlp.down_proj.weight"].__setitem__((60, 7), value))
    error = refused(source, tmp_path / "out", dtype="float16", max_shard_size="1MB")
    assert error.field == "model.layers.1.mlp.down_proj.weight"
    assert f"element {60 * 20_000 + 7}" in str(error)
    assert PART < 60 * 20_000 + 7


def test_a_value_beyond_the_new_dtype_is_refused(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    edit_weights(source, poison(1e6))
    assert "beyond the range of float16" in str(refused(source, tmp_path / "out", dtype="float16"))
    assert import_model(source, tmp_path / "out", dtype="bfloat16").dtype == "bfloat16"


def test_wrong_sources_are_one_line(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    assert "no such file or directory" in str(refused(tmp_path / "nowhere", tmp_path / "out"))
    assert "neither a model directory nor a .gguf file" in str(refused(source / WEIGHTS, tmp_path / "out"))
    assert "did you mean 'bfloat16'" in str(refused(source, tmp_path / "out", dtype="bfloat"))
    assert "model_type" in str(refused_config(source, tmp_path, model_type="mamba"))
    assert "num_key_value_heads" in str(refused_config(source, tmp_path, num_key_value_heads=3))
    (source / "tokenizer.json").write_text("{")
    error = refused(source, tmp_path / "out")
    assert error.file == str(source / "tokenizer.json")
    (source / "config.json").rename(source / "adapter_config.json")
    assert "this is an adapter" in str(refused(source, tmp_path / "out"))
    (source / "adapter_config.json").unlink()
    (source / "model.gguf").write_bytes(b"")
    assert str(source / "model.gguf") in str(refused(source, tmp_path / "out"))


def refused_config(source: Path, tmp_path: Path, **changes: Any) -> SmedjanError:
    before = (source / "config.json").read_bytes()
    edit_config(source, **changes)
    error = refused(source, tmp_path / "out")
    assert isinstance(error, ConfigError)
    assert error.file == str(source / "config.json")
    (source / "config.json").write_bytes(before)
    return error


def test_pickled_weights_are_never_opened(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    (source / WEIGHTS).unlink()
    marker = tmp_path / "ran"
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    error = refused(source, tmp_path / "out")
    assert error.file == str(source / "pytorch_model.bin")
    assert "save_pretrained" in str(error)
    assert not marker.exists()


def test_a_model_without_a_tokenizer_is_imported_and_said(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert any("there is no tokenizer.json" in note for note in import_model(source, tmp_path / "out").notes)


def test_older_tokenizer_files_are_converted(model_directory: Make, tmp_path: Path) -> None:
    """vocab.json and merges.txt: the directory that is made has the tokenizer.json that its source lacks."""
    source = model_directory()
    expected = load_tokenizer(source).encode("the dog, they've")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    report = import_model(source, tmp_path / "out")
    assert any("made tokenizer.json" in note for note in report.notes)
    assert "tokenizer.json" in {file["path"] for file in report.files} - {file["path"] for file in report.sources}
    assert load_tokenizer(tmp_path / "out").encode("the dog, they've") == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the dog, they've").input_ids == expected


def test_a_tokenizer_larger_than_the_model_is_said(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory(vocab_size=200)
    notes = import_model(source, tmp_path / "out").notes
    assert any("the model only 200 embeddings" in note for note in notes)

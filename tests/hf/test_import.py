"""An import is a checked copy that transformers and mlx-lm load unchanged, or one line and nothing on disk."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from smedjan.checkpoint.raw import PART
from smedjan.checkpoint.safetensors import open_checkpoint, open_file
from smedjan.errors import CheckpointError, ConfigError, SmedjanError
from smedjan.hf.import_model import import_model
from smedjan.hf.tokenizer import load_tokenizer

Make = Callable[..., Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load(directory: Path) -> LlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


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


def refused(source: Path, out: Path, **options: Any) -> SmedjanError:
    """The error of an import, after which nothing is there."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(SmedjanError) as caught:
        import_model(source, out, **options)
    assert sorted(path.name for path in out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return caught.value


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
    assert "PEFT adapter" in str(refused(source, tmp_path / "out"))
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


def test_an_existing_destination_is_refused_before_any_work(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    shutil.copytree(source, tmp_path / "out")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())
    assert "not empty" in str(refused(source, tmp_path / "out"))
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_full_disk_leaves_nothing(
    at: int, model_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills at the 1st, 2nd, 4th file: one line that names the destination, nothing half-written."""
    source = model_directory()
    left, real = [at], os.fsync

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    error = refused(source, tmp_path / "out")
    assert "the disk is full" in str(error)
    assert error.file is not None
    assert error.file.startswith(str(tmp_path / "out"))


def test_ctrl_c_leaves_nothing(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()

    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "out", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


INTERRUPTED = """
import os, signal, sys, threading
from smedjan.hf.import_model import import_model
here = []
def progress(done, total):
    if not here and done > total // 2:
        here.append(done)
        os.kill(os.getpid(), signal.SIGINT)
try:
    import_model(sys.argv[1], sys.argv[2], max_shard_size="1MB", progress=progress)
except KeyboardInterrupt:
    print(threading.active_count())
"""


def test_an_interrupt_from_outside_stops_every_thread(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory(hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
    words = [sys.executable, "-c", INTERRUPTED, str(source), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_counts_every_byte(model_directory: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    import_model(model_directory(), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == len(open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("stored", ["50KB", "1GB"])
@pytest.mark.parametrize("size", ["50KB", 50_000, "70kb", "1.5 GB"])
def test_shards_are_of_the_size_asked_for(
    stored: str, size: str | int, tiny_model: Make, model_directory: Make, tmp_path: Path
) -> None:
    """From shards and from one file, to shards of the same size, of another and to one file: the same model.

    The hashes are those of the files: also where one pass serves two files because they are the same bytes.
    """
    source, model = model_directory(), tiny_model()
    (source / WEIGHTS).unlink()
    model.save_pretrained(source, max_shard_size=stored)
    report = import_model(source, tmp_path / "out", max_shard_size=size)
    limit = 50_000 if size in ("50KB", 50_000) else 70_000
    shards = list((tmp_path / "out").glob("model*.safetensors"))
    assert (len(shards) > 1) == (size != "1.5 GB")
    for shard in shards:
        held = open_file(shard)
        assert len(held) == 1 or sum(entry.spec.nbytes for entry in held.entries.values()) <= limit or len(shards) == 1
    same_plan = (stored, size) in {("50KB", "50KB"), ("50KB", 50_000), ("1GB", "1.5 GB")}
    assert same_plan == ({sha256_of(file) for file in source.glob("*.safetensors")} == {*map(sha256_of, shards)})
    for folder, files in ((source, report.sources), (tmp_path / "out", report.files)):
        assert {file["path"]: file["sha256"] for file in files} == {
            path.name: sha256_of(path) for path in folder.iterdir()
        }
    again = load(tmp_path / "out")
    assert all(torch.equal(left, right) for left, right in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("size", ["big", "0", "-5GB", "", "5PB", "1e9"])
def test_a_size_that_is_none_is_one_line(size: str, model_directory: Make, tmp_path: Path) -> None:
    error = refused(model_directory(), tmp_path / "out", max_shard_size=size)
    assert str(error).startswith(f"max_shard_size: is {size!r}; give a size such as 5GB")


def test_what_does_not_fit_on_the_disk_is_not_begun(
    model_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    error = refused(model_directory(), tmp_path / "out")
    assert error.file == str(tmp_path / "out")
    assert "the model takes 401 KB, the disk has 300 KB free; free 101 KB" in str(error)
    import_model(tmp_path / "source", tmp_path / "out", dtype="bfloat16")


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


MEMORY = """
import resource, sys
from smedjan.hf.import_model import import_model
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_model(sys.argv[1], sys.argv[2], dtype=sys.argv[3], max_shard_size=sys.argv[4])
assert not {"torch", "transformers", "mlx", "triton"} & set(sys.modules)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", "5GB"), ("float32", "30MB")])
def test_memory_does_not_grow_with_the_model(dtype: str, size: str, model_directory: Make, tmp_path: Path) -> None:
    """160 MB, half of it in two tensors, take less than one of those: copied or widened, in one file or many.

    Mapped pages of the source count, as they do for whoever watches the process. No framework is imported.
    """
    shape = {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    source = model_directory(dtype=torch.bfloat16, **shape)
    words = [str(source), str(tmp_path / "out"), dtype, size]
    done = subprocess.run([sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    mapped = (source / WEIGHTS).stat().st_size
    assert mapped > 150e6
    assert int(done.stdout) * 1024 < mapped / 4

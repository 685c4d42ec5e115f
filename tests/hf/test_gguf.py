"""A GGUF file becomes the HF model that it was made from: names, rows of q and k, rope, tying, tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from smedjan.checkpoint.gguf import open_gguf
from smedjan.checkpoint.gguf_file import QUANTIZATIONS
from smedjan.errors import CheckpointError, ConfigError, SmedjanError
from smedjan.hf.import_model import import_model

Make = Callable[..., Any]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load(directory: Path) -> LlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": LLAMA3, "max_position_embeddings": 16384, "head_dim": 64},
    ],
    ids=["plain", "tied", "no groups", "head_dim", "biases", "linear", "llama3"],
)
def test_an_unquantized_model_comes_back_with_equal_logits(
    changes: dict, tmp_path: Path, tiny_model: Make, write_gguf: Make
) -> None:
    """HF model -> llama.cpp's layout -> import -> HF model: every logit equal to the bit."""
    model = tiny_model(**changes)
    rope = model.config.rope_parameters

    def extra(writer: gguf.GGUFWriter) -> None:
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "llama3":
            plain = tiny_model(
                **{**changes, "rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}}
            )
            divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
            writer.add_tensor("rope_freqs.weight", divisors.numpy())

    source = write_gguf(tmp_path / "a.gguf", model, extra=extra)
    report = import_model(source, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model.eval()))
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert again.config.rms_norm_eps == model.config.rms_norm_eps == 1e-6
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.dtype == "float32"


def blocks(kind: str, values: np.ndarray) -> np.ndarray:
    """Random blocks of a K-quant for a matrix of this shape; the `gguf` package writes none."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(values.size)
    raw = generator.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
    for at in (0, 2) if kind != "Q6_K" else (size - 2,):
        raw[..., at : at + 2] = generator.uniform(0, 1e-3, (*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(values.shape[0], -1)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_model_is_the_one_transformers_reads(
    kind: str, tmp_path: Path, tiny_model: Make, write_gguf: Make
) -> None:
    """transformers' own GGUF loader gives the same weights to the bit, for every type that we read."""
    model = tiny_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8)
    raw = (lambda name, values: blocks(kind, values)) if kind.endswith("_K") else (lambda name, values: None)
    source = write_gguf(tmp_path / "a.gguf", model, kind=kind, raw=raw)
    report = import_model(source, tmp_path / "out")
    ours = load(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The peer cannot fill a tensor that it does not find: what it read is what we wrote, not its random start.
    assert all(not torch.equal(ours[name], p) or p.ndim == 1 or kind == "F32" for name, p in model.named_parameters())
    assert report.source_quantization is not None
    assert report.source_quantization[kind] == 9 + (3 if kind == "F32" else 0)


def test_the_tokenizer_and_its_template_come_along(tmp_path: Path, tiny_model: Make, write_gguf: Make) -> None:
    import_model(write_gguf(tmp_path / "a.gguf", tiny_model()), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 2)
    model = load(tmp_path / "out")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 0)


def test_keys_that_older_files_lack_have_llama_cpp_s_defaults(
    tmp_path: Path, tiny_model: Make, write_gguf: Make
) -> None:
    model = tiny_model()
    drop = ("add_vocab_size", "add_rope_dimension_count", "add_key_length", "add_value_length", "add_rope_freq_base")
    found = open_gguf(write_gguf(tmp_path / "a.gguf", model, drop=drop)).config
    assert (found["vocab_size"], found["head_dim"], found["rope_theta"]) == (300, 16, 10000.0)


def test_a_second_end_of_turn_is_kept(tmp_path: Path, tiny_model: Make, write_gguf: Make) -> None:
    source = write_gguf(tmp_path / "a.gguf", tiny_model(), extra=lambda writer: writer.add_eot_token_id(2))
    found = open_gguf(source)
    assert found.config["eos_token_id"] == [0, 2]
    assert found.generation_config["eos_token_id"] == [0, 2]


REFUSED = {
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count", "experts"),
    "unknown scaling": (
        lambda w: w.add_string("llama.rope.scaling.type", "ntk"),
        "llama.rope.scaling.type",
        "supported: linear, longrope, none, yarn",
    ),
    "scaled attention": (
        lambda w: w.add_float32("llama.rope.scaling.attn_factor", 1.5),
        "llama.rope.scaling.attn_factor",
        "only yarn and longrope",
    ),
    "longrope without factors": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        "rope_factors_short.weight",
        "longrope needs 8 factors",
    ),
    "attention to what follows": (lambda w: w.add_causal_attention(False), "llama.attention.causal", "causal"),
    "half of yarn": (
        lambda w: w.add_rope_scaling_yarn_ext_factor(0.5),
        "llama.rope.scaling.yarn_ext_factor",
        "whole of yarn",
    ),
    "part of a head turned": (lambda w: w.add_rope_dimension_count(8), "llama.rope.dimension_count", "must be equal"),
    "values of another width": (lambda w: w.add_value_length(8), "llama.attention.value_length", "as wide as keys"),
    "unknown key": (lambda w: w.add_uint32("llama.novelty", 1), "llama.novelty", "--ignore-key llama.novelty"),
    "split": (lambda w: w.add_uint16("split.count", 2), "split.count", "llama-gguf-split"),
    "other divisors": (
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
        "rope_freqs.weight",
        "safetensors",
    ),
    "tensor of another model": (
        lambda w: w.add_tensor("blk.0.ssm_conv1d.weight", np.ones(4, np.float32)),
        "blk.0.ssm_conv1d.weight",
        "not a plain llama",
    ),
    "layers that differ": (
        lambda w: w.add_array("llama.attention.head_count_kv", [2, 1]),
        "llama.attention.head_count_kv",
        "one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_llama_is_refused_in_one_line(
    case: str, tmp_path: Path, tiny_model: Make, write_gguf: Make
) -> None:
    extra, field, remedy = REFUSED[case]
    drop = {
        "layers that differ": ("add_head_count_kv",),
        "part of a head turned": ("add_rope_dimension_count",),
        "values of another width": ("add_value_length",),
    }.get(case, ())
    source = write_gguf(tmp_path / "a.gguf", tiny_model(), extra=extra, drop=drop)
    with pytest.raises(SmedjanError) as caught:
        import_model(source, tmp_path / "out")
    assert (caught.value.file, caught.value.field) == (str(source), field)
    assert remedy in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_can_be_let_pass(tmp_path: Path, tiny_model: Make, write_gguf: Make) -> None:
    source = write_gguf(tmp_path / "a.gguf", tiny_model(), extra=lambda w: w.add_uint32("llama.novelty", 1))
    report = import_model(source, tmp_path / "out", ignore_keys=["llama.novelty"])
    assert any("llama.novelty" in note for note in report.notes)


def test_another_architecture_and_a_wrong_shape_are_refused(tmp_path: Path, tiny_model: Make, write_gguf: Make) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"general.architecture: 'mamba' is not supported"):
        import_model(tmp_path / "b.gguf", tmp_path / "out")

    def narrower(writer: gguf.GGUFWriter) -> None:
        writer.add_feed_forward_length(64)

    source = write_gguf(tmp_path / "a.gguf", tiny_model(), drop=("add_feed_forward_length",), extra=narrower)
    with pytest.raises(CheckpointError, match=r"has shape \[96, 64\], the metadata say \[64, 64\]") as caught:
        import_model(source, tmp_path / "out")
    assert caught.value.field == "blk.0.ffn_gate.weight"

"""Tiny Llamas made by transformers, a tokenizer made by `tokenizers`, GGUF files written as llama.cpp writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on",
    "Don't stop: I'll say it's 12345 times 678 is 9, they've gone  home\n\n\tand we're done",
    "naïve café Straße 日本語 русский 🙂🙂 ²½Ⅷ",
] * 8
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def _tiny_model(**changes: Any) -> LlamaForCausalLM:
    """A random float32 Llama: V 300, H 64, 2 layers, 4 heads on 2 groups."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def _byte_level_tokenizer(pre: pre_tokenizers.PreTokenizer, size: int = 300) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>", "<|start|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    return _tiny_model


@pytest.fixture
def byte_level_tokenizer() -> Callable[..., tokenizers.Tokenizer]:
    return _byte_level_tokenizer


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    return _write_gguf


@pytest.fixture
def model_directory(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model and its tokenizer with transformers and gives the directory."""

    def make(name: str = "source", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        directory = tmp_path / name
        _tiny_model(**changes).to(dtype).save_pretrained(directory)
        backend = _byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
        )
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(directory)
        return directory

    return make


def _permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: the halves of each head become neighbours."""
    width = weights.shape[0] // heads
    return weights.reshape(heads, 2, width // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def _gguf_name(name: str) -> str:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def _tokenizer_metadata(writer: gguf.GGUFWriter) -> None:
    backend = _byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)


def _write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    extra: Callable[[gguf.GGUFWriter], object] | None = None,
    drop: tuple[str, ...] = (),
    raw: Callable[[str, np.ndarray], np.ndarray | None] = lambda name, values: None,
) -> Path:
    """`model` as llama.cpp's converter writes it, its matrices quantized to `kind`, or to the blocks `raw` gives."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    keys = {
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_block_count": config.num_hidden_layers,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_rope_freq_base": config.rope_parameters["rope_theta"],
        "add_layer_norm_rms_eps": config.rms_norm_eps,
        "add_vocab_size": config.vocab_size,
        "add_rope_dimension_count": config.head_dim,
        "add_key_length": config.head_dim,
        "add_value_length": config.head_dim,
    }
    for method, value in keys.items():
        if method not in drop:
            getattr(writer, method)(value)
    if extra is not None:
        extra(writer)
    if "tokenizer" not in drop:
        _tokenizer_metadata(writer)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if ".q_proj." in name:
            values = _permute(values, config.num_attention_heads)
        elif ".k_proj." in name:
            values = _permute(values, config.num_key_value_heads)
        quantization = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        stored = raw(name, values) if values.ndim == 2 else None
        if stored is None:
            stored = gguf.quants.quantize(np.ascontiguousarray(values), quantization)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

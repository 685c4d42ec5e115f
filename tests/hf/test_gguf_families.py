"""Every family that llama.cpp has, exported and run there: logits and greedy text are transformers'; and back again.

The models are those of tests/families.py, a few layers of random weights. What llama.cpp cannot compute is refused,
each case by the field that says why.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smedjan.checkpoint.gguf import open_gguf
from smedjan.checkpoint.gguf_arch import BY_FAMILY
from smedjan.checkpoint.gguf_mixture import FILE_TYPES
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.errors import ConfigError
from smedjan.hf.export_gguf import export_gguf
from smedjan.models.config import read_json_object
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import ARCHITECTURES, read_config
from tests import llama_cpp
from tests.families import ALL, BASE, CASES, LONG, NO_HEAD_DIM, PLAIN_HEADS, ROPES, SHORT, WINDOW, make_model
from tests.tolerances import assert_near

V, PROMPT, GENERATED = 300, 24, 64
GELU = ("GELU", "GELUActivation", "GELUTanh", "NewGELUActivation")

# Settings that llama.cpp can compute, where the family's own cases hold one that it cannot.
OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("gemma2", "windows"): {**BASE, **WINDOW, "query_pre_attn_scalar": 8},
    ("gemma2", "tight-caps"): {
        **{**BASE, **WINDOW, "query_pre_attn_scalar": 8},
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    ("gemma3_text", "windows"): {
        **{**BASE, **WINDOW, "query_pre_attn_scalar": 8, "num_hidden_layers": 7},
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"},
        },
    },
    ("phi3", "short-factors"): {
        **{**BASE, "max_position_embeddings": 1024, "original_max_position_embeddings": 512},
        "rope_parameters": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    },
    ("qwen2", "yarn-attention"): {
        **BASE,
        "rope_parameters": {"rope_theta": 1e6, **ROPES["yarn"], "attention_factor": 1.3},
    },
    ("gemma3_text", "cap-scaled-global"): {
        **CASES["gemma3_text"]["scaled-global"],
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    ("exaone4", "windows"): {**BASE, **WINDOW, "num_hidden_layers": 64},
    ("smollm3", "untied"): {**BASE, "tie_word_embeddings": False},
    ("gpt_neox", "sequential"): {**PLAIN_HEADS, "use_parallel_residual": False, "rotary_pct": 0.5},
    ("cohere2", "wide"): {**NO_HEAD_DIM, **WINDOW, "num_hidden_layers": 5, "logit_scale": 0.3},
    ("granite", "llama3"): {**BASE, "rope_parameters": CASES["llama"]["rope-llama3"]["rope_parameters"]},
}

REFUSED = {
    ("llama", "rope-yarn-all"): "rope_parameters",
    ("qwen3", "window-biases"): "bias",
    ("gemma", "untied-biases"): "bias",
    ("gemma2", "plain"): "query_pre_attn_scalar",
    ("gemma2", "tight-caps"): "query_pre_attn_scalar",
    ("gemma2", "no-caps"): "query_pre_attn_scalar",
    ("gemma3_text", "plain"): "query_pre_attn_scalar",
    ("gemma3_text", "cap-biases"): "bias",
    ("gemma3_text", "scaled-global"): "query_pre_attn_scalar",
    ("smollm3", "window"): "no_rope_layers",
    ("smollm3", "biases-untied"): "bias",
    ("olmo2", "biases"): "bias",
    ("starcoder2", "no-biases-window"): "bias",
    ("cohere2", "biases-scale"): "bias",
    ("cohere", "biases"): "bias",
    ("gpt_neox", "sequential"): "bias",
    ("gpt2", "by-layer"): "scale_attn_by_inverse_layer_idx",
    ("gpt2", "untied-unscaled"): "attention scale",
    ("arcee", "biases"): "bias",
    ("seed_oss", "biases"): "bias",
    ("ernie4_5", "biases"): "bias",
    ("exaone4", "plain"): "sliding_window",
    ("helium", "plain"): "model_type",
    ("helium", "biases"): "model_type",
    ("vaultgemma", "plain"): "model_type",
}
RUN = [case for case in ALL if case not in REFUSED]


def settings_of(family: str, name: str, own: bool = False) -> dict[str, Any]:
    made = copy.deepcopy(OWN[family, name] if own else CASES[family][name])
    made["vocab_size"] = V
    # Room for the text, but where the case is about a model that outgrows its positions.
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    if "dynamic" not in name and made[positions] <= 64:
        made[positions] = 128
    return made


def model_directory(
    folder: Path, family: str, settings: dict[str, Any], **options: Any
) -> tuple[Path, PreTrainedModel]:
    """The model as transformers saves it, with a byte-level tokenizer of 259 tokens."""
    model = make_model(family, settings, attention="eager", **options)
    directory = folder / "model"
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(("<|unk|>", "<s>", "</s>", "<|pad|>", *alphabet))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "ab": len(vocabulary)}, merges=[("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>", unk_token="<|unk|>"
    ).save_pretrained(directory)
    return directory, model


class _HalfGelu(torch.nn.Module):
    """ggml's table of GELU: of the float16 nearest to x, in float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = x.to(torch.float16).float()
        table = torch.nn.functional.gelu(rounded, approximate="tanh").to(torch.float16).float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


def as_ggml(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' float32 model with the two roundings that are ggml's own: GELU's table, and frequencies that are
    made one from the other, f[i + 1] = f[i] theta^(-2 / D)."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name in ("act", "act_fn", "activation_fn"):
            if type(getattr(module, name, None)).__name__ in (
                "GELU",
                "GELUActivation",
                "GELUTanh",
                "NewGELUActivation",
            ):
                setattr(module, name, _HalfGelu())
    for module in plain.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("inv_freq") and not name.startswith("original"):
                setattr(module, name, _iterated(buffer))
    return plain


def _iterated(frequencies: torch.Tensor) -> torch.Tensor:
    """Each frequency with the error that a float32 product of as many factors has at most."""
    steps = torch.arange(len(frequencies), dtype=torch.float64)
    signs = torch.where(steps % 2 == 0, 1.0, -1.0)
    return (frequencies.double() * (1 + signs * (steps + 1) * 2.0**-24)).float()


def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    out = list(ids)
    for _ in range(count):
        out.append(int(logits_of(model, out)[-1].argmax()))
    return out[len(ids) :]


def exact_gelu(model: PreTrainedModel) -> None:
    """What llama.cpp computes for GELU, where the model's is by erf: the export's notes say so."""
    for module in model.modules():
        for name in ("act", "act_fn", "activation_fn"):
            if type(getattr(module, name, None)).__name__ == "GELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def text_of(family: str, name: str, config: DecoderConfig) -> tuple[int, int]:
    """(prompt, generated): as long as llama.cpp computes what the model does."""
    window = config.window
    if window is not None and not BY_FAMILY[family].windows:
        return min(window, PROMPT), max(0, min(window - PROMPT, GENERATED))
    rope = config.layers[0].rope
    if rope is not None and rope.rope_type == "dynamic":
        return config.max_position_embeddings, 0
    return PROMPT, GENERATED


@pytest.mark.parametrize(
    ("family", "name", "own"),
    [*((*case, False) for case in RUN), *((*case, True) for case in OWN)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_llama_cpp_computes_what_transformers_does(family: str, name: str, own: bool, tmp_path: Path) -> None:
    """Prefill and 64 tokens of greedy text through the cache, at F32."""
    directory, model = model_directory(tmp_path, family, settings_of(family, name, own))
    export_gguf(directory, tmp_path / "m.gguf", type="F32")
    config = read_config(read_json_object(directory / "config.json"), directory / "config.json")
    prompt, generated = text_of(family, name, config)
    ids = torch.randint(4, 259, (prompt,), generator=torch.Generator().manual_seed(3)).tolist()
    exact_gelu(model)
    reference = copy.deepcopy(model).double()
    with llama_cpp.Model(tmp_path / "m.gguf", context=128) as theirs:
        found = torch.from_numpy(theirs.logits(ids))
        assert_near("logits", found, logits_of(reference, ids), logits_of(as_ggml(model), ids))
        assert theirs.greedy(ids, generated) == greedy(model, ids, generated)


def saying_what_gguf_can(config: DecoderConfig) -> DecoderConfig:
    """`config` without what no GGUF file holds: the family where another computes the same, GELU by erf, dropout,
    longrope's factor, of which only the attention's is left, and dynamic scaling."""
    family = config.model_type
    if family in ("mistral", "ministral") and config.window is None:
        family = "llama"
    layers = []
    for layer in config.layers:
        rope = layer.rope
        if rope is not None and rope.rope_type == "longrope":
            rope = replace(rope, factor=None, attention_factor=float(np.float32(rope.attention_scaling)))
        if rope is not None and rope.rope_type == "dynamic":
            rope = replace(rope, rope_type="default", factor=None, max_position_embeddings=None)
        if rope is not None and rope.rope_type == "yarn":
            rope = replace(rope, truncate=True)
        layers.append(replace(layer, rope=rope, scale=float(np.float32(layer.scale))))
    return replace(
        config,
        model_type=family,
        architecture=ARCHITECTURES[family].ARCHITECTURE,
        layers=tuple(layers),
        hidden_act="gelu" if "gelu" in config.hidden_act else config.hidden_act,
        dropout={},
    )


@pytest.mark.parametrize(
    ("family", "name", "own"),
    [*((*case, False) for case in RUN), *((*case, True) for case in OWN)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_back_from_gguf_it_is_the_same_model(family: str, name: str, own: bool, tmp_path: Path) -> None:
    """F32: the same configuration, and every tensor the same to the bit. Gemma's norms, which the file holds as w + 1,
    are the same where w is a bfloat16."""
    settings = settings_of(family, name, own)
    directory, _ = model_directory(tmp_path, family, settings, dtype="bfloat16" if "gemma" in family else "float32")
    export_gguf(directory, tmp_path / "m.gguf", type="F32")
    before = read_config(read_json_object(directory / "config.json"), directory / "config.json")
    back = open_gguf(tmp_path / "m.gguf")
    after = read_config(back.config, tmp_path / "m.gguf")
    assert saying_what_gguf_can(after) == saying_what_gguf_can(before)
    stored = dict(before.stored)
    source = open_checkpoint(directory)
    assert list(back.tensors) == list(before.parameter_shapes())
    for parameter in back.tensors:
        one, other = values(back.tensors[parameter]), values(source[stored.get(parameter, parameter)])
        assert np.array_equal(one, other), parameter


def values(tensor: RawTensor) -> np.ndarray:
    """The float32 bits."""
    if tensor.dtype == "bfloat16":
        return np.frombuffer(tensor.data, np.uint16).astype(np.uint32).reshape(tensor.shape) << 16
    assert tensor.dtype == "float32"
    return np.frombuffer(tensor.data, np.uint32).reshape(tensor.shape)


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(family: str, name: str, tmp_path: Path) -> None:
    directory, _ = model_directory(tmp_path, family, settings_of(family, name))
    with pytest.raises(ConfigError) as caught:
        export_gguf(directory, tmp_path / "m.gguf", type="F32")
    assert caught.value.field == REFUSED[family, name]
    assert caught.value.file == str(directory / "config.json")
    assert "llama.cpp" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_family_is_run_or_refused_by_name() -> None:
    """None is left out: a family without a case, or a case that is neither run nor refused, would be."""
    ran = {family for family, _ in RUN} | {family for family, _ in OWN}
    assert ran == set(BY_FAMILY)
    assert {family for family, _ in REFUSED} - ran == set(ARCHITECTURES) - set(BY_FAMILY)


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What ggml multiplies weights of this type with: the same float, or 8 bits a number, scaled in blocks."""
    if kind in ("F32", "F16", "BF16"):
        return x.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    blocks = x.reshape(*x.shape[:-1], -1, 256 if "K" in kind else 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step).round() * step).reshape(x.shape)


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_type_loads_and_runs(kind: str, tmp_path: Path) -> None:
    """A model wide enough for super-blocks: llama.cpp's logits are those of the weights that we read back."""
    settings = {**BASE, "vocab_size": V, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    settings.update(num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=128)
    directory, model = model_directory(tmp_path, "llama", settings)
    report = export_gguf(directory, tmp_path / "m.gguf", type=kind)
    back = open_gguf(tmp_path / "m.gguf").tensors
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(values(back[parameter]).view(np.float32)))
    ids = list(range(4, 4 + PROMPT))
    reference = logits_of(copy.deepcopy(model).double(), ids)
    plain = as_ggml(model)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0], kind),))
    with llama_cpp.Model(tmp_path / "m.gguf", context=128) as theirs:
        assert_near(kind, torch.from_numpy(theirs.logits(ids)), reference, logits_of(plain, ids))
    assert report.types[kind.removesuffix("_S").removesuffix("_M")] >= 7
    assert sum(report.types.values()) == 21
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size

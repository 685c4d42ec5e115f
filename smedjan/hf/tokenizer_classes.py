"""What the name of a tokenizer class says: which files it reads, how it cuts text, which special tokens it has.

transformers keeps this in code, one class each; a directory without `tokenizer.json` names only the class. Every fact
here is one that its tokenizer files do not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smedjan.errors import TokenizerError, nearest
from smedjan.hf.gguf_tokenizer import PRE_TOKENIZERS
from smedjan.models.config import read_json_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The tokens that have a name of their own in tokenizer_config.json."""

_NFC = {"type": "NFC"}
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class TokenizerClass:
    """One of transformers' classes.

    `sentencepiece`: it reads `tokenizer.model`, otherwise `vocab.json` and `merges.txt`. `specials`: its tokens where
    the directory names none. `pre_tokenizer`, `normalizer`: steps of a byte-level BPE, in tokenizer.json's form.
    `sets_prefix`: it heeds `add_prefix_space`.
    """

    sentencepiece: bool = False
    specials: dict[str, str] = field(default_factory=dict)
    pre_tokenizer: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None
    adds_bos: bool = False
    sets_prefix: bool = True


_GPT2 = TokenizerClass(
    specials=dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT),
    pre_tokenizer=PRE_TOKENIZERS["gpt-2"].steps,
)

TOKENIZER_CLASSES: dict[str, TokenizerClass] = {
    "LlamaTokenizer": TokenizerClass(
        sentencepiece=True,
        specials={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        adds_bos=True,
    ),
    "GemmaTokenizer": TokenizerClass(
        sentencepiece=True,
        specials={"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        adds_bos=True,
        sets_prefix=False,
    ),
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "Qwen2Tokenizer": TokenizerClass(
        specials=dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END_OF_TEXT),
        pre_tokenizer=PRE_TOKENIZERS["qwen2"].steps,
        normalizer=PRE_TOKENIZERS["qwen2"].normalizer,
    ),
    "GPTNeoXTokenizer": TokenizerClass(
        specials={**_GPT2.specials, "pad_token": "<|padding|>"},
        pre_tokenizer=PRE_TOKENIZERS["gpt-2"].steps,
        normalizer=_NFC,
    ),
    "CohereTokenizer": TokenizerClass(
        specials={
            "unk_token": "<UNK>",
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>",
            "cls_token": "<CLS>",
            "sep_token": "<SEP>",
            "mask_token": "<MASK_TOKEN>",
        },
        pre_tokenizer=PRE_TOKENIZERS["smollm"].steps,
        normalizer=_NFC,
    ),
}
"""By the name in tokenizer_config.json, without a closing `Fast`."""

_BY_MODEL_TYPE = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "phi3"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}
"""The class that transformers pairs with a model where no file names one."""


def optional_json(file: Path) -> dict[str, Any]:
    """The object in `file`, or {} where there is no such file."""
    return read_json_object(file, TokenizerError) if file.is_file() else {}


def class_name(directory: Path, config: dict[str, Any]) -> str | None:
    """The tokenizer class of a directory whose tokenizer_config.json is `config`: named there, in config.json, or by
    the model type."""
    model = optional_json(directory / "config.json")
    for file, data in (("tokenizer_config.json", config), ("config.json", model)):
        if (name := data.get("tokenizer_class")) is None:
            continue
        if not isinstance(name, str):
            raise TokenizerError(
                f"is {name!r}, not a name", file=directory / file, field="tokenizer_class", remedy="give a string"
            )
        return name.removesuffix("Fast")
    model_type = model.get("model_type")
    return _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def tokenizer_class(directory: Path, config: dict[str, Any]) -> tuple[str, TokenizerClass]:
    """The class by which the directory's files are to be read; an unknown one is a TokenizerError."""
    name = class_name(directory, config)
    remedy = "write tokenizer.json with transformers: AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIR)"
    if name in TOKENIZER_CLASSES:
        return name, TOKENIZER_CLASSES[name]
    file = directory / "tokenizer_config.json"
    if name is None:
        raise TokenizerError(
            "is missing, and without tokenizer.json it alone says how text is cut",
            file=file,
            field="tokenizer_class",
            remedy=f"name one of {', '.join(TOKENIZER_CLASSES)}, or {remedy}",
        )
    close = nearest(name, set(TOKENIZER_CLASSES))
    hint = f"the nearest known is {close}; " if close else ""
    raise TokenizerError(
        f"{name!r} is not a class whose way of cutting text is known",
        file=file,
        field="tokenizer_class",
        remedy=hint + remedy,
    )


def token_content(token: Any, file: Path, field: str) -> str | None:
    """A token written as a string, as an AddedToken object, or as null."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token
    raise TokenizerError(f"is {token!r}, not a token", file=file, field=field, remedy="give a string")


def named_tokens(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`bos_token` and its kin as the directory gives them (string, AddedToken object or null), where it does.

    tokenizer_config.json speaks alone where it has `added_tokens_decoder`; before transformers 4.34 it had none, and
    special_tokens_map.json goes before it, as transformers reads those directories.
    """
    special = optional_json(directory / "special_tokens_map.json")
    order = (config, special) if "added_tokens_decoder" in config else (special, config)
    return {
        name: next(data[name] for data in order if name in data)
        for name in SPECIAL_TOKENS
        if any(name in data for data in order)
    }

"""Special tokens and chat templates are found where transformers finds them, in every form that they are written in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from smedjan.errors import TokenizerError
from smedjan.hf.tokenizer import load_tokenizer

START = {"content": "<|start|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
MESSAGES = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "ho"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é"}}]


@pytest.fixture
def directory(byte_level_tokenizer: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A directory with a small tokenizer.json (tokens <|end|> 0, <|start|> 1, <|pad|> 2) and the files given."""
    backend = byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))

    def make(files: dict[str, Any]) -> Path:
        (tmp_path / "tokenizer.json").write_text(backend.to_str())
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


def config(**keys: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **keys}}


NAMES: dict[str, dict[str, Any]] = {
    "strings": config(bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|end|>"),
    "objects": config(bos_token={"__type": "AddedToken", **START}, eos_token="<|end|>"),
    "null": config(bos_token=None, eos_token="<|end|>", pad_token=None),
    "only the map": {**config(), "special_tokens_map.json": {"bos_token": START, "eos_token": "<|end|>"}},
    "the map first": {**config(eos_token="<|pad|>"), "special_tokens_map.json": {"eos_token": "<|end|>"}},
    "the map not read": {
        **config(eos_token="<|pad|>", added_tokens_decoder={"1": {**START, "special": True}}),
        "special_tokens_map.json": {"eos_token": "<|end|>"},
    },
    "others": config(eos_token="<|end|>", sep_token="<|pad|>", cls_token="<|start|>", image_token="<|pad|>"),
    "nothing": config(),
}


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_those_of_transformers(name: str, directory: Callable[..., Path]) -> None:
    path = directory(NAMES[name])
    ours, peer = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    for key in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{key}_token") == getattr(peer, f"{key}_token")
        assert getattr(ours, f"{key}_token_id") == getattr(peer, f"{key}_token_id")
    assert ours.special_tokens == peer.special_tokens_map


def test_a_class_names_the_tokens_that_no_file_names(directory: Callable[..., Path]) -> None:
    """gpt2's own directory: tokenizer.json, and a config without tokens; a token that the vocabulary lacks is none."""
    path = directory({"tokenizer_config.json": {"model_max_length": 1024}, "config.json": {"model_type": "gpt2"}})
    assert load_tokenizer(path).eos_token is None
    text = (path / "tokenizer.json").read_text().replace("<|end|>", "<|endoftext|>")
    (path / "tokenizer.json").write_text(text)
    ours, peer = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert (ours.eos_token, ours.eos_token_id) == (peer.eos_token, peer.eos_token_id) == ("<|endoftext|>", 0)
    assert (ours.bos_token, ours.unk_token) == (peer.bos_token, peer.unk_token)
    assert ours.eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("generation", "model", "found"),
    [
        ([2, 1], 7, (0, 2, 1)),
        (2, [7], (0, 2)),
        (None, [5, 0, 6], (0, 5, 6)),
        (None, None, (0,)),
    ],
)
def test_every_stop_token_counts(
    generation: Any, model: Any, found: tuple[int, ...], directory: Callable[..., Path]
) -> None:
    files = {"generation_config.json": {"eos_token_id": generation}, "config.json": {"eos_token_id": model}}
    assert load_tokenizer(directory({**config(eos_token="<|end|>"), **files})).eos_token_ids == found


def template(name: str) -> str:
    return name + " {{ bos_token }}{% for m in messages %}[{{ m.name is defined }}{{ m.content }}]{% endfor %}"


TEMPLATES: dict[str, dict[str, Any]] = {
    "file": {"chat_template.jinja": template("file"), **config(chat_template=template("inline"))},
    "file with others": {
        "chat_template.jinja": template("file"),
        "additional_chat_templates/tool_use.jinja": template("tools"),
        "additional_chat_templates/rag.jinja": template("rag"),
    },
    "inline": config(chat_template=template("inline"), bos_token="<|start|>"),
    "list": config(
        chat_template=[
            {"name": "default", "template": template("default")},
            {"name": "tool_use", "template": template("tools")},
        ]
    ),
    "without default": {"additional_chat_templates/tool_use.jinja": template("tools")},
    "line ends": {"chat_template.jinja": "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n"},
    "none": config(),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("chosen", [None, "rag", "tool_use"])
def test_the_template_is_transformers_choice(
    name: str, tools: Any, chosen: str | None, directory: Callable[..., Path]
) -> None:
    path = directory({**config(), **TEMPLATES[name]})
    ours, peer = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    if chosen is not None and chosen not in ours.chat_templates:
        # transformers would take the name itself for a template
        with pytest.raises(TokenizerError, match=f"no chat template '{chosen}'"):
            ours.apply_chat_template(MESSAGES, tools=tools, chat_template=chosen)
        return
    try:
        expected = peer.apply_chat_template(MESSAGES, tools=tools, chat_template=chosen, tokenize=False)
    except ValueError:
        with pytest.raises(TokenizerError, match="there is no chat template 'default'"):
            ours.apply_chat_template(MESSAGES, tools=tools, chat_template=chosen)
    else:
        assert ours.apply_chat_template(MESSAGES, tools=tools, chat_template=chosen)[0] == expected
        assert ours.template_for(tools, chosen) == peer.get_chat_template(chosen, tools)


def test_the_older_json_is_read_last(directory: Callable[..., Path]) -> None:
    path = directory({**config(), "chat_template.json": {"chat_template": template("json")}})
    assert load_tokenizer(path).chat_template == template("json")
    directory(config(chat_template=template("inline")))
    assert load_tokenizer(path).chat_template == template("inline")


def test_prompts_continuations_and_variables_reach_the_template(directory: Callable[..., Path]) -> None:
    turns = "{% for m in messages %}{{ m.content }}{{ eos_token if not loop.last or add_generation_prompt }}"
    rest = "{% endfor %}{{ documents }}{{ mode }}{{ image_token }}{{ strftime_now('%Y') }}"
    source = "{{ bos_token }}" + turns + rest
    path = directory(config(chat_template=source, bos_token="<|start|>", eos_token="<|end|>", image_token="<|pad|>"))
    ours, peer = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    for kw in (
        {"add_generation_prompt": True, "mode": "m"},
        {"continue_final_message": True},
        {"documents": [{"title": "t"}], "eos_token": "override"},
    ):
        assert ours.apply_chat_template(MESSAGES, **kw)[0] == peer.apply_chat_template(MESSAGES, tokenize=False, **kw)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "number": (config(chat_template=3), "chat_template", "is of type int"),
    "empty list": (config(chat_template=[]), "chat_template", "is of type list"),
    "list of strings": (config(chat_template=["a"]), "chat_template", "is of type list"),
    "no name": (config(chat_template=[{"template": "a"}]), "chat_template", "is of type list"),
    "token": (config(eos_token=3), "eos_token", "not a token"),
    "unknown token": (config(eos_token="<|nothing|>"), "eos_token", "is not in the vocabulary"),
    "class": ({"tokenizer_config.json": {"tokenizer_class": ["x"]}}, "tokenizer_class", "not a name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_forms_are_named(name: str, directory: Callable[..., Path]) -> None:
    files, field, message = WRONG[name]
    path = directory(files)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert (caught.value.file, caught.value.field) == (str(path / "tokenizer_config.json"), field)


def test_a_template_that_is_no_text(directory: Callable[..., Path]) -> None:
    path = directory(config())
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        load_tokenizer(path)
    assert caught.value.file == str(path / "chat_template.jinja")

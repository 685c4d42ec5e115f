"""Token ids in a real llama.cpp are those of the tokenizer that was exported, on over a thousand hard strings.

llama.cpp normalizes nothing: where the tokenizer does (NFC), both are given normalized text, and the export says so.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smedjan.errors import TokenizerError
from smedjan.hf.export_gguf import export_gguf
from smedjan.hf.gguf_pre import PRE_TOKENIZERS, pre_tokenizer_name
from smedjan.hf.import_model import import_model
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.hf.tokenizer_convert import convert_tokenizer
from tests import llama_cpp
from tests.hard_text import TRAPS, hard_text
from tests.hf.conftest import CORPUS

SPECIALS = ["<|end|>", "<|start|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SIZE = 420


def byte_level(name: str) -> Tokenizer:
    """A tokenizer that cuts text as PRE_TOKENIZERS says for `name`, trained on the corpus and the traps."""
    pre = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre.whole_words))
    blank = {"version": "1.0", "added_tokens": [], "model": json.loads(tokenizer.to_str())["model"]}
    tokenizer = Tokenizer.from_str(json.dumps({**blank, "pre_tokenizer": pre.steps, "normalizer": pre.normalizer}))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *TRAPS], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=False)])
    if pre.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", pair="<|start|> $A <|start|> $B", special_tokens=[("<|start|>", 1)]
        )
    return tokenizer


def save(directory: Path, tokenizer: Tokenizer) -> None:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes a directory a model's, by one whose weights nobody looks at."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
        eos_token_id=[4, 0],
        pad_token_id=2,
    )
    made = LlamaForCausalLM(config)

    def save_model(directory: Path) -> Path:
        made.save_pretrained(directory)
        return directory

    return save_model


def differing(directory: Path, gguf: Path, texts: list[str]) -> list[str]:
    """The texts whose ids are others in llama.cpp."""
    tokenizer = load_tokenizer(directory)
    with llama_cpp.Model(gguf, vocab_only=True) as theirs:
        return [
            text
            for text in texts
            if theirs.tokenize(text, add_special=True) != tokenizer.encode(text)
            or theirs.tokenize(text) != tokenizer.encode(text, add_special_tokens=False)
        ]


BYTE_LEVEL = ["gpt-2", "llama-bpe", "qwen2", "smollm", "smaug-bpe", "command-r", "olmo", "stablelm2", "seed-coder"]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_ids_are_equal(name: str, tmp_path: Path, model: Callable[[Path], Path]) -> None:
    save(tmp_path / "model", byte_level(name))
    report = export_gguf(model(tmp_path / "model"), tmp_path / "m.gguf", type="F32")
    texts = hard_text(seed=1, count=1200, special=[*SPECIALS, "<tool>", "    "])
    if PRE_TOKENIZERS[name].normalizer is not None:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        assert any("NFC" in note for note in report.notes)
    assert len(texts) >= 1200
    assert differing(tmp_path / "model", tmp_path / "m.gguf", texts) == []


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_patterns_that_llama_cpp_approximates_differ_where_the_note_says(
    name: str, tmp_path: Path, model: Callable[[Path], Path]
) -> None:
    save(tmp_path / "model", byte_level(name))
    report = export_gguf(model(tmp_path / "model"), tmp_path / "m.gguf", type="F32")
    assert any("mixed case" in note for note in report.notes)
    differ = differing(tmp_path / "model", tmp_path / "m.gguf", hard_text(seed=1, count=1200, special=SPECIALS))
    assert len(differ) < 12
    assert all(any(c.isupper() and not c.isascii() for c in text) for text in differ)


def sentencepiece_model(directory: Path, cls: str, **config: Any) -> Path:
    """A BPE of SentencePiece's own trainer, converted to tokenizer.json."""
    directory.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [*CORPUS, *(text for text in TRAPS if text.strip() and not {"\n", "\0"} & set(text))] * 2
        ),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=cls != "GemmaTokenizer",
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        pad_id=3,
        user_defined_symbols=["<|user|>", "\n\n"],
        control_symbols=["<|sep|>"],
        minloglevel=2,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls, **names, **config}))
    (directory / "config.json").write_text("{}")
    for name, content in convert_tokenizer(directory).items():
        (directory / name).write_bytes(content)
    return directory


PIECES = ["<s>", "</s>", "<pad>", "<unk>", "<|user|>", "<|sep|>", "\n\n"]


@pytest.mark.parametrize(("cls", "config"), [("LlamaTokenizer", {"legacy": True}), ("GemmaTokenizer", {})])
def test_sentencepiece_ids_are_equal(
    cls: str, config: dict[str, Any], tmp_path: Path, model: Callable[[Path], Path]
) -> None:
    """With a space before each text, and without; with bytes for what no piece holds."""
    directory = model(sentencepiece_model(tmp_path / "model", cls, **config))
    report = export_gguf(directory, tmp_path / "m.gguf", type="F32")
    assert report.notes == ()
    assert differing(directory, tmp_path / "m.gguf", hard_text(seed=2, count=1200, special=PIECES)) == []


def test_a_space_that_llama_cpp_adds_is_noted(tmp_path: Path, model: Callable[[Path], Path]) -> None:
    """Llama's tokenizer, not legacy: ids differ only where a text begins with a space or holds an added token."""
    directory = model(sentencepiece_model(tmp_path / "model", "LlamaTokenizer", legacy=False))
    report = export_gguf(directory, tmp_path / "m.gguf", type="F32")
    assert len(report.notes) == 1
    assert "behind each special token" in report.notes[0]
    texts = hard_text(seed=2, count=1200, special=PIECES)
    plain = [text for text in texts if text[:1] not in (" ", "▁") and not any(piece in text for piece in PIECES)]
    assert len(plain) > 400
    assert differing(directory, tmp_path / "m.gguf", plain) == []


def test_template_stops_and_special_ids_come_along(tmp_path: Path, model: Callable[[Path], Path]) -> None:
    """llama.cpp stops at all ids that generation_config.json names, and has the chat template; so has the Modelfile."""
    directory = tmp_path / "model"
    save(directory, byte_level("smollm"))
    model(directory)
    settings = {"eos_token_id": [4, 0, 3], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    export_gguf(directory, tmp_path / "small.gguf", type="F32")
    with llama_cpp.Model(tmp_path / "small.gguf", vocab_only=True) as theirs:
        assert theirs.chat_template == TEMPLATE
        assert theirs.stop_tokens == {4, 0, 3}
        assert theirs.vocab_size == 1024
        assert theirs.detokenize(theirs.tokenize("naïve 🙂 <|im_end|>")) == "naïve 🙂 <|im_end|>"
    assert (tmp_path / "small.Modelfile").read_text().splitlines() == [
        "FROM ./small.gguf",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|end|>"',
        'PARAMETER stop "<|im_start|>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 40",
        "PARAMETER top_p 0.9",
    ]


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "command-r", "sentencepiece"])
def test_a_tokenizer_comes_back(name: str, tmp_path: Path, model: Callable[[Path], Path]) -> None:
    """tokenizer.json -> GGUF -> tokenizer.json: equal ids, the same special tokens and template, no padding tokens."""
    directory = tmp_path / "model"
    if name == "sentencepiece":
        sentencepiece_model(directory, "LlamaTokenizer", legacy=True, chat_template=TEMPLATE)
    else:
        save(directory, byte_level(name))
    export_gguf(model(directory), tmp_path / "m.gguf", type="F32")
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    before, after = load_tokenizer(directory), load_tokenizer(tmp_path / "back")
    special = PIECES if name == "sentencepiece" else [*SPECIALS, "<tool>", "    "]
    texts = hard_text(seed=3, count=1000, special=special)
    assert [text for text in texts if before.encode(text) != after.encode(text)] == []
    ids = [before.encode(text) for text in texts]
    assert [before.decode(each) for each in ids] == [after.decode(each) for each in ids]
    assert before.vocab_size == after.vocab_size < 1024
    assert before.special_tokens == after.special_tokens
    assert before.chat_template == after.chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(tmp_path / "back").vocab_size <= 1024


def test_names_are_found_by_what_a_pre_tokenizer_does() -> None:
    """Not by how it is written: a Split that removes what is between its matches isolates them."""
    split, level = PRE_TOKENIZERS["llama-bpe"].steps["pretokenizers"]
    removed = {**split, "behavior": "Removed", "invert": True}
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [removed]}, level]}
    assert pre_tokenizer_name(nested, whole_words=True) == "llama-bpe"
    assert pre_tokenizer_name(nested, whole_words=False) == "smaug-bpe"
    for steps in (split, {**level, "add_prefix_space": True}, {"type": "Whitespace"}, None, {"type": "Sequence"}):
        assert pre_tokenizer_name(steps, whole_words=False) is None


def edited(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "tokenizer.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edit


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "another way to cut": (
        _set("pre_tokenizer", value={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        "pre_tokenizer",
        "known: gpt-2",
    ),
    "another normalizer": (_set("normalizer", value={"type": "Lowercase"}), "normalizer", "normalizes no text"),
    "no BPE": (
        _set("model", value={"type": "WordLevel", "vocab": {"<|end|>": 0}, "unk_token": "<|end|>"}),
        "model.type",
        "BPE",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_say_is_refused(case: str, tmp_path: Path, model: Callable[[Path], Path]) -> None:
    edit, field, remedy = REFUSED[case]
    save(tmp_path / "model", byte_level("smollm"))
    model(tmp_path / "model")
    edited(tmp_path / "model", edit)
    if case == "no BPE":
        (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
        edited(tmp_path / "model", _set("added_tokens", value=[]))
    with pytest.raises(TokenizerError) as caught:
        export_gguf(tmp_path / "model", tmp_path / "m.gguf", type="F32")
    assert caught.value.file == str(tmp_path / "model" / "tokenizer.json")
    assert caught.value.field == field
    assert remedy in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_merges_that_sentencepiece_would_not_make_are_refused(tmp_path: Path, model: Callable[[Path], Path]) -> None:
    """llama.cpp joins any two pieces whose union is one: a merge less, and its ids were others."""
    directory = model(sentencepiece_model(tmp_path / "model", "LlamaTokenizer", legacy=True))
    edited(directory, lambda data: data["model"]["merges"].pop())
    with pytest.raises(TokenizerError, match=r"though .* is a token") as caught:
        export_gguf(directory, tmp_path / "m.gguf", type="F32")
    assert caught.value.field == "model.merges"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", byte_level("gpt-2"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(TokenizerError, match=r"model.vocab: has token \d+, the model 300 embeddings"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf", type="F32")

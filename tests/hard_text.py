"""Hard text for tokenizers: the same strings for the same seed, whoever compares what with whom.

A fixed list of named traps comes first; the rest is drawn from the categories below and mixed, since most tokenizer
defects sit where two kinds of text meet (a special token after a combining mark, a tab before a flag).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

TRAPS = (
    "",
    " ",
    "  ",
    "   leading, trailing   ",
    "\n",
    "\n\n\n",
    "\r\n\r\n",
    "\t\t x \t\n y\n\n  z",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u2029h\u0085i",
    "Don't they'll I'VE it'S 'twas rock'n'roll ''s 'S 'LL 'll",
    "1 12 123 1234 1234567 3.14159 1,000,000 0x7fff 1e-5 ²½Ⅷ ٣٤ १२ 𝟘𝟙",
    "naïve café Straße ſ ﬁ İstanbul ångström é e\u0301 o\u0308\u0323 \u1e9b\u0323",
    "Z\u0351\u036b\u0343a\u0327\u0301\u0323l\u0334\u035dg\u0321o\u0489",
    "日本語のテキスト、한국어 텍스트。中文測試：你好，世界！ｆｕｌｌ　ｗｉｄｔｈ ﾊﾝｶｸ",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8 \ud55c\uad6d",
    "עברית مرحبا بالعالم \u202bRTL\u202c \u200f\u200e شُكْرًا",
    "हिन्दी क्षत्रिय ไทยไม่มีช่องว่าง தமிழ் བོད་ཡིག ភាសាខ្មែរ",
    "🙂👩\u200d👩\u200d👧\u200d👦🇸🇪🇯🇵🇺 👍🏽👍🏿 ❤️ ☺︎ 1️⃣ 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31m\x1f\x7f\u0080\u009f",
    "\ufffd\ufffe\uffff\U0001fffe\U0010ffff\ue000\U000f0000",
    "def f(x):\n    return x**2  # ok!?\n\n\n\nclass A:\n\tpass\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]<<2;}//end\r\n#include <vector>\r\n",
    '{"a": [1, 2.5e-3, null, true], "b\\u00e9": "\\"x\\"\\n"}',
    "http://user@a.b:80/c?d=e&f=%20#g <html lang='x'>&amp;</html> \\n {{x}} {% y %} ``` ~~ __init__",
    "▁▁ ▁a▁b ▁\u2581 Ġ Ċ ĉ <0x41> <0x0A> <unk> <s> </s> <pad> </w> ## ##a",
    "ends in \u2581 \u2581\u2581 ",
    "-----=====_____*****.....!!!!!?????",
    "a" * 300,
    "ab" * 200,
    "é" * 100,
    "日" * 100,
    " " * 64 + "x" + "\t" * 17 + "\n" * 9,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
    "The quick brown fox jumps over 13 lazy dogs; " * 8,
)
"""Traps that are in every set, whatever the seed."""

_WORDS = re.findall(
    r"\S+",
    "the of and in model token Hello WORLD camelCaseName snake_case_name don't we've O'Neil re-entry e.g. i.e. Ph.D. "
    "straße Größe façade coöperate Привет мир ελληνικά žluťoučký kůň 東京 你好 안녕 مرحبا שלום नमस्ते สวัสดี "
    "antidisestablishmentarianism x y z A I",
)
_CODE = (
    "def g(a, *b, **c): ...",
    "if (x != y && !z || w <= 3) { return ~x ^ y; }",
    "    \tindent = mixed\n",
    "lambda x: x[::-1]",
    "SELECT * FROM t WHERE a='b'--c",
    "$ ls -la | grep '^d' > /dev/null 2>&1",
    "<div class=\"a\" id='b'>x</div>",
    "\\begin{equation} \\frac{a}{b}^2 \\end{equation}",
    "x = 0b1010_1111 + 0o17 + 1_000_000 - 1.5e+10j",
    'f"{x!r:>{width}}"',
    "#!/usr/bin/env python3\n# -*- coding: utf-8 -*-\n",
    "@decorator\nasync def h() -> None:\n        await q\n",
    "a->b::c<d>(e)?.f ?? g",
    "/* c */ // d\n",
)
_EMOJI = re.findall(
    r"\S+",
    "🙂 😀 🤖 🚀 ❤️ ❤ ☺ ☺︎ 👍🏽 👍 👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🏴\u200d☠️ 🇸🇪 🇯🇵 🇺🇸 🇸 1️⃣ #️⃣ ©️ ™ ♻️ "
    "🧑🏾\u200d🤝\u200d🧑🏻 🫠",
)
_SPACES = (" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u2009", "\u3000", "\u200b", "\ufeff", "\v", "\f")
_CONTROLS = "\x00\x01\x02\x07\x08\x1b\x1c\x7f\u0080\u0085\u0090\u009f\u200d\u200e\u200f\u202a\u202e\u2066\ufff9\ufffd"
_MARKS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0323\u0327\u0328\u0338\u0345\u0489\u05b0\u0651\u093c\u3099\u20dd\ufe0f"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»“”‘’„…–—·•§¶†‡€£¥°±×÷≤≥≠∞∑√→⇒∀∃∈、。「」！？"
# First and last code point of each script drawn from.
_SCRIPTS = (
    (0x0041, 0x005A),
    (0x00C0, 0x024F),
    (0x0370, 0x03FF),
    (0x0410, 0x044F),
    (0x05D0, 0x05EA),
    (0x0620, 0x064A),
    (0x0905, 0x0939),
    (0x0E01, 0x0E3A),
    (0x1100, 0x1112),
    (0x1E00, 0x1EFF),
    (0x2460, 0x24FF),
    (0x3041, 0x3096),
    (0x30A1, 0x30FA),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xFF01, 0xFF9F),
    (0x10400, 0x1044F),
    (0x1D400, 0x1D6A3),
    (0x20000, 0x2A6DF),
)


def _any_scalar(draw: random.Random) -> str:
    """Any Unicode scalar value, assigned or not: all but the surrogates, which are no text."""
    point = draw.randrange(0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)


def _script(draw: random.Random) -> str:
    first, last = draw.choice(_SCRIPTS)
    return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 8)))


def _marked(draw: random.Random) -> str:
    return "".join(
        draw.choice("aeionuAOכشक東") + "".join(draw.choices(_MARKS, k=draw.randint(0, 4)))
        for _ in range(draw.randint(1, 6))
    )


def _number(draw: random.Random) -> str:
    digits = draw.choice(("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３", "²³¹½¾Ⅳ"))
    return draw.choice(("", "-", "+", "$", "#")) + "".join(draw.choices(digits, k=draw.randint(1, 12)))


def _long_word(draw: random.Random) -> str:
    piece = "".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCé", k=draw.randint(1, 12)))
    return piece * draw.randint(1, 40)


def _any_text(draw: random.Random) -> str:
    return "".join(_any_scalar(draw) for _ in range(draw.randint(1, 6)))


_KINDS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
    (6, lambda draw: " ".join(draw.choices(_WORDS, k=draw.randint(1, 8)))),
    (3, lambda draw: draw.choice(_CODE)),
    (3, lambda draw: draw.choice(("", " ")).join(draw.choices(_EMOJI, k=draw.randint(1, 5)))),
    (5, lambda draw: draw.choice(_SPACES) * draw.randint(1, 9)),
    (2, lambda draw: "".join(draw.choices(_SPACES, k=draw.randint(1, 6)))),
    (2, lambda draw: "".join(draw.choices(_CONTROLS, k=draw.randint(1, 3)))),
    (3, lambda draw: "".join(draw.choices(_PUNCTUATION, k=draw.randint(1, 6)))),
    (3, _script),
    (3, _marked),
    (3, _number),
    (1, _long_word),
    (2, _any_text),
)


def hard_text(seed: int = 0, count: int = 1000, special: Sequence[str] = (), controls: bool = True) -> list[str]:
    """At least `count` strings, `TRAPS` first, each valid UTF-8; every token of `special` stands in several.

    `special`: the tokenizer's own special and added tokens, put alone, between words, doubled, torn and beside spaces.
    `controls`: False leaves out C0 control characters but tab, newline and return, for peers that take C strings.
    """
    draw = random.Random(seed)
    texts = list(TRAPS)
    for token in special:
        texts += [
            token,
            f"{token}{token}",
            f" {token} ",
            f"a{token}b",
            f"a {token} b\n{token}\n",
            f"{token[:-1]}",
            f"\u0301{token}é",
            f"  {token}  {token}\t",
        ]
    weights, kinds = [weight for weight, _ in _KINDS], [kind for _, kind in _KINDS]
    while len(texts) < count:
        parts = [kind(draw) for kind in draw.choices(kinds, weights, k=draw.randint(1, 7))]
        if special and draw.random() < 0.3:
            parts.insert(draw.randint(0, len(parts)), draw.choice(list(special)))
        texts.append(draw.choice(("", "", " ")).join(parts))
    if not controls:
        kept = [c for c in range(32) if chr(c) not in "\t\n\r"]
        texts = [text.translate(dict.fromkeys(kept)) for text in texts]
    return texts

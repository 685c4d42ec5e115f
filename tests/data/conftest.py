"""A small byte-level BPE tokenizer over the `tokenizers` library, and chat templates as models ship them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>")
SPECIALS += ("<|end_header_id|>", "<|eot_id|>")

CORPUS = [
    "system user assistant\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n",
    "the answer is four, and the question was what is two plus two; the notice names the license\n\n",
    "Hello, how are you? I am fine. naïve café — 日本語 🙂 tabs\tand  double  spaces\n",
] * 3

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-135M-Instruct's (Apache-2.0)."""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""After Llama 3.2's."""

MARKED = """{%- set ns = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'hidden' -%}{%- continue -%}{%- endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {{ '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' -%}
        {% generation %}{% if message.reasoning_content %}{{ '(' + message.reasoning_content + ') ' }}{% endif -%}
        {{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else -%}
        {{ message.content + '<|im_end|>' }}
    {%- endif -%}
    {{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
"""With `{% generation %}` marks, a namespace and loop controls."""


@dataclass(frozen=True)
class SmallTokenizer:
    """The Tokenizer protocol of smedjan.data.mask."""

    backend: tokenizers.Tokenizer
    bos_token: str | None = "<|begin_of_text|>"
    eos_token: str | None = "<|im_end|>"
    chat_template: str | None = SMOLLM2

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return () if self.eos_token_id is None else (self.eos_token_id,)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def fingerprint(self) -> str:
        return repr((self.backend.to_str(), self.bos_token, self.eos_token, self.chat_template))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def build(trim_offsets: bool = False, special_bos: bool = False, special_eos: bool = False) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    single = ["<|begin_of_text|>"] * special_bos + ["$A"] + ["<|im_end|>"] * special_eos
    names = [(token, backend.token_to_id(token)) for token in ("<|begin_of_text|>", "<|im_end|>")]
    template = processors.TemplateProcessing(single=" ".join(single), special_tokens=names)
    backend.post_processor = processors.Sequence([byte_level, template])
    return backend


@pytest.fixture(scope="session")
def plain() -> SmallTokenizer:
    """Adds no specials, like SmolLM2's."""
    return SmallTokenizer(build())


@pytest.fixture(scope="session")
def with_bos() -> SmallTokenizer:
    """Adds BOS, like Llama's."""
    return SmallTokenizer(build(special_bos=True))


@pytest.fixture(scope="session")
def trimmed() -> SmallTokenizer:
    """Leaves white space out of its offsets, like GPT-2's."""
    return SmallTokenizer(build(trim_offsets=True))


@pytest.fixture(scope="session")
def with_eos() -> SmallTokenizer:
    """Adds BOS and EOS."""
    return SmallTokenizer(build(special_bos=True, special_eos=True))


@pytest.fixture
def with_template(plain: SmallTokenizer) -> Callable[[str | None], SmallTokenizer]:
    return lambda template: replace(plain, chat_template=template)


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Of `smollm2` no marks are known, since it differs in a byte from the model's: its turns are found by prefix."""
    return {"smollm2": SMOLLM2 + "{# #}", "llama3": LLAMA3, "marked": MARKED}

"""What the model says while it trains: greedy answers to a few prompts, the same ones all along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smedjan.data.formats import SUFFIXES, Broken, read_rows, stream_rows
from smedjan.data.mask import Example
from smedjan.errors import ConfigError, DataError
from smedjan.generate.loop import generate
from smedjan.hf.dataset_hub import data_path
from smedjan.hf.tokenizer import Tokenizer
from smedjan.runtime.session import Session

if TYPE_CHECKING:
    from smedjan.train.parts import Finetune

ROWS = 3
"""Of the data, where no prompts are given."""

NEW_TOKENS = 48

FIELD = "train.sample_prompts"


class Samples:
    """Prompts as tokens. They take nothing from training: no random number, no array that a step reads or writes."""

    def __init__(self, parts: Finetune) -> None:
        self.tokenizer = parts.tokenizer
        context = parts.files.config.max_position_embeddings
        self.longest = max(1, context - NEW_TOKENS)
        self.new_tokens = max(1, min(NEW_TOKENS, context - 1))
        given = parts.config.train.sample_prompts
        dataset = parts.eval_dataset or parts.dataset
        chat = given is not None and _conversations(parts)
        self.prompts = (
            [prompt_of(example) for example in dataset.examples[:ROWS]]
            if given is None
            else [_encoded(text, self.tokenizer, chat) for text in texts_of(given)]
        )
        self.stop = sorted({*self.tokenizer.eos_token_ids, *parts.files.config.eos_token_id})

    def __call__(self, session: Session) -> list[dict[str, str]]:
        """[{prompt, text}]: both without special tokens; a prompt that leaves no room has lost its beginning."""
        made = []
        for prompt in self.prompts:
            ids = prompt[-self.longest :]
            found = list(generate(session, ids, max_new_tokens=self.new_tokens, stop=self.stop))
            made.append({"prompt": self.tokenizer.decode(ids), "text": self.tokenizer.decode(found)})
        return made


def prompt_of(example: Example) -> list[int]:
    """The tokens before the first that is trained, as training and serving render them. A row that is trained from
    its first tokens on (a text) has no prompt: a quarter of it stands for one."""
    before = int(np.argmax(example.labels_mask)) if example.labels_mask.any() else len(example)
    if before < 2:
        before = max(1, len(example) // 4)
    return [int(token) for token in example.input_ids[:before]]


def texts_of(given: str) -> list[str]:
    """The prompts of `--train.sample-prompts`: the lines of a text file, the `prompt` (or `text`) of a file of rows,
    or the text itself."""
    path = Path(given)
    try:
        is_file = path.is_file()
    except OSError:  # a text too long for a name
        is_file = False
    if not is_file:
        if path.suffix in (*SUFFIXES, ".txt") and "\n" not in given:
            raise ConfigError(
                "no such file", file=path, field=FIELD, remedy="check the path, or give the prompt itself"
            )
        return [given]
    if path.suffix in SUFFIXES:
        rows = read_rows(path)
        texts = [row.prompt or row.text for row in rows]
        if not all(texts):
            raise DataError(
                "holds conversations", file=path, field=FIELD, remedy="give rows with a `prompt` or `text` of text"
            )
        return texts
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ConfigError("holds no line", file=path, field=FIELD, remedy="write a prompt on each line")
    return texts


def _conversations(parts: Finetune) -> bool:
    """Whether the rows are rendered by the chat template. They were read as tokens: this looks at the first again."""
    if parts.tokenizer.chat_template is None:
        return False
    # The run has read them: whatever it leaves out is left out here too
    path = data_path(parts.config.data, "train")
    return bool(next(stream_rows(path, broken=Broken(parts.config.train.broken))).messages)


def _encoded(text: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    """As the run's rows begin: a user's turn where they are conversations, else plain text."""
    if chat:
        rendered, _ = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        return tokenizer.encode(rendered, False)
    ids = tokenizer.encode(text)
    # A tokenizer that closes what it encodes would end the answer before it begins.
    return ids[:-1] if len(ids) > 1 and ids[-1] in tokenizer.eos_token_ids else ids

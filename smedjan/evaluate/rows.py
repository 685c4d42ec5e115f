"""Rows to evaluate on: those that are trained on, and two types that have an answer but nothing to train.

    {"prompt": str or [message, ...], "choices": [str, ...], "answer": index, letter or text}    -> Choice
    {"prompt": str or [message, ...], "answer": str or [str, ...]}                               -> Question
    {"prompt", "completion"}, {"messages"}, {"text"}                                             -> Row, as in training

A choice follows the prompt as it stands, tokenised apart, as a completion does in training. A prompt of messages is
rendered by the chat template, with the prompt for an answer behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from smedjan.data.files import Source, data_files, read_records
from smedjan.data.formats import KNOWN_COLUMNS, Message, Row, row_of
from smedjan.errors import DataError
from smedjan.hf.tokenizer import Tokenizer

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """`answer` is the index of the right one of `choices`."""

    source: Source
    prompt: Prompt
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Any of `references` is right."""

    source: Source
    prompt: Prompt
    references: tuple[str, ...]


EvalRow = Choice | Question | Row


COLUMNS = KNOWN_COLUMNS | {"choices", "answer", "answers"}


def read_eval_rows(path: str | Path, *, limit: int | None = None, chat: bool = True) -> list[EvalRow]:
    """The rows of a file, or of the test split of a folder, `limit` at most; all of one type. `chat` as in
    `read_rows`."""
    rows: list[EvalRow] = []
    records = chain.from_iterable(read_records(file, COLUMNS) for file in data_files(path, "test"))
    for source, record in islice(records, limit):
        row = eval_row(record, source, chat=chat)
        if rows and _type(row) != _type(rows[0]):
            raise source.error(
                f"a row of type {_type(row)}, but {rows[0].source} is {_type(rows[0])}", "give rows of one type"
            )
        rows.append(row)
    if not rows:
        raise DataError("holds no row", file=path, remedy="give a file with at least one row")
    return rows


def eval_row(record: object, source: Source, *, chat: bool = True) -> EvalRow:
    """A parsed record, its type found by its keys."""
    given = {key: value for key, value in record.items() if value is not None} if isinstance(record, Mapping) else {}
    if "choices" in given:
        return _choice(given, source)
    if "prompt" in given and given.keys() & {"answer", "answers"} and "completion" not in given:
        return _question(given, source)
    return row_of(record, source, chat=chat)


def asked(row: Question | Row) -> tuple[Prompt, tuple[str, ...]] | None:
    """What a row asks and the answers that are right; None where it has no answer."""
    if isinstance(row, Question):
        return row.prompt, row.references
    if not row.messages:
        return (row.prompt, (row.completion,)) if row.kind == "prompt+completion" else None
    last = row.messages[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str) or len(row.messages) < 2:
        return None
    return row.messages[:-1], (last["content"],)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The tokens before an answer."""
    if not isinstance(prompt, str):
        text, _ = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    # Some tokenizers close every text.
    closed = ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token or "\0")
    return ids[:-1] if closed else ids


def _type(row: EvalRow) -> str:
    if isinstance(row, Row):
        return row.shape
    return "prompt+choices+answer" if isinstance(row, Choice) else "prompt+answer"


def _choice(record: Mapping[str, Any], source: Source) -> Choice:
    choices = record["choices"]
    if isinstance(choices, str):  # a CSV has no lists
        try:
            choices = json.loads(choices)
        except ValueError:
            raise source.error("`choices` is no list", 'write ["one", "another"]') from None
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise source.error("`choices` is no list of strings that say something", 'write ["one", "another"]')
    if len(choices) < 2:
        raise source.error("has fewer than 2 `choices`", "add the others")
    if "prompt" not in record or "answer" not in record:
        lacking = "answer" if "prompt" in record else "prompt"
        raise source.error(f"lacks `{lacking}`", f"add `{lacking}`, or remove the row")
    answer = _index(record["answer"], choices)
    if answer is None:
        last = ascii_uppercase[len(choices) - 1] if len(choices) <= len(ascii_uppercase) else "..."
        raise source.error(
            f"`answer` is {record['answer']!r}, which is none of the {len(choices)} choices",
            f"give its index from 0, its letter (A to {last}) or its text",
        )
    return Choice(source=source, prompt=_prompt(record["prompt"], source), choices=tuple(choices), answer=answer)


def _index(answer: Any, choices: list[str]) -> int | None:
    """Text goes first, so that choices that are letters or numbers mean themselves."""
    if isinstance(answer, str):
        for text in (answer, answer.strip()):
            if text in choices:
                return choices.index(text)
        stripped = [choice.strip() for choice in choices]
        if answer.strip() in stripped:
            return stripped.index(answer.strip())
        letter = answer.strip().upper()
        if len(letter) == 1 and letter in ascii_uppercase:
            answer = ascii_uppercase.index(letter)
        elif letter.isdecimal():
            answer = int(letter)
    fits = type(answer) is int and 0 <= answer < len(choices)
    return answer if fits else None


def _question(record: Mapping[str, Any], source: Source) -> Question:
    name = "answers" if "answers" in record else "answer"
    given = record[name]
    references = given if isinstance(given, list) else [given]
    if not references or not all(isinstance(reference, str) and reference for reference in references):
        raise source.error(f"`{name}` is no string and no list of strings", f"write `{name}` as a string, or several")
    return Question(source=source, prompt=_prompt(record["prompt"], source), references=tuple(references))


def _prompt(value: Any, source: Source) -> Prompt:
    """Checked as the prompt of a row that is trained on."""
    completion = "-" if isinstance(value, str) else [{"role": "assistant", "content": "-"}]
    row = row_of({"prompt": value, "completion": completion}, source)
    return row.prompt if isinstance(value, str) else row.messages[: row.prompt_messages]

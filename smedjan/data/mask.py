"""Rows to token ids, each with the mask of the tokens that are trained.

A token is *trained* when the model is taught to predict it. What is trained, by row type and `loss_on`:

    row                  "completion" (default)              "last"                      "all"
    text                 everything + EOS                    everything + EOS            everything + EOS
    prompt + completion  the completion + EOS                the completion + EOS        everything + EOS
    messages             every assistant turn + stop token   the last one + stop token   everything

Prompt and completion are tokenised apart, so that the boundary is the one that generation will see. A conversation is
rendered once and tokenised whole, with no added specials: the template writes them. Its assistant turns are the
template's `{% generation %}` spans; those of a marked template that is shipped for it (`training_template`) and renders
the same; or, where there is none, what each turn adds to the rendered conversation before it.
The stop token that closes a turn (`<|im_end|>`) is trained; white space that the template writes after it is not, since
nothing ever generates it.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Protocol, get_args

import numpy as np

from smedjan.data.chat_template import Span, marks_generation, render
from smedjan.data.example import Example
from smedjan.data.files import Broken
from smedjan.data.formats import Message, Row
from smedjan.data.tokens import Tokens, TokenWriter
from smedjan.data.training_template import training_template
from smedjan.errors import DataError, TokenizerError

LossOn = Literal["all", "completion", "last"]
TooLong = Literal["error", "truncate", "drop"]


class Tokenizer(Protocol):
    """What data needs of a tokenizer. Offsets count characters of the text, one [start, end) a token."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def eos_token_ids(self) -> Collection[int]:
        """Every token at which generation stops: the tokenizer's EOS and those of generation_config.json."""
        ...

    @property
    def chat_template(self) -> str | None: ...
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]: ...
    def fingerprint(self) -> str:
        """Equal where all that is said here is equal: for the cache of tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows: read = kept + dropped + broken, and `truncated` of the kept ones are cut. `unstopped` of the kept, uncut
    ones train no stop token at their end: a model that learns from them alone never stops."""

    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    broken: int = 0
    unstopped: int = 0

    @property
    def rows(self) -> dict[str, int]:
        """What became of the rows, as `--json` has it."""
        return {"kept": self.kept, "truncated": self.truncated, "dropped": self.dropped, "broken": self.broken}


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """`converted`: what the rows were converted from and to, if they were; `first_broken`: what is wrong with the first
    that was left out."""

    examples: Tokens
    counts: Counts
    converted: dict[str, str] | None = None
    first_broken: DataError | None = None


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "completion",
    too_long: TooLong = "error",
    now: datetime | None = None,
    into: TokenWriter | None = None,
    broken: Broken | None = None,
) -> Tokenized:
    """Every row as an Example of at most `max_length` tokens. They are written `into` files, or kept in memory.

    `too_long` says what happens to a longer row: "error", "truncate" (a prefix of it is kept; a row of which no trained
    token would remain is dropped, never its answer kept alone) or "drop". `broken`: what happens to one that cannot be
    masked; the counts have all that it has left out, where the rows were read as well.
    Raises DataError for a row that may not be left out, and when no row is left.
    """
    assert too_long in get_args(TooLong), too_long
    broken = broken or Broken()
    writer = TokenWriter(lambda name: io.BytesIO()) if into is None else into
    kept = truncated = dropped = unstopped = 0
    row = None
    for row in rows:
        try:
            whole = tokenize_row(row, tokenizer, loss_on=loss_on, now=now)
        except DataError as error:
            broken(error)
            continue
        example = fit(whole, max_length=max_length, too_long=too_long)
        if example is None:
            dropped += 1
            continue
        writer.append(example)
        kept += 1
        truncated += example.truncated
        unstopped += not example.truncated and not stops(example, tokenizer)
    assert row is not None, "read_rows never gives no rows"
    if not kept and not dropped:
        broken.none_left(row.file)
    if not kept:
        others = f", but for {broken.count} broken ones," if broken.count else ""
        raise DataError(
            f"no trained token: all {dropped} rows{others} are longer than {max_length} tokens",
            file=row.file,
            remedy="raise --train.max-length, or use shorter rows",
        )
    counts = Counts(kept=kept, truncated=truncated, dropped=dropped, broken=broken.count, unstopped=unstopped)
    return Tokenized(examples=writer.tokens(), counts=counts, converted=row.converted, first_broken=broken.first)


def tokenize_row(
    row: Row, tokenizer: Tokenizer, *, loss_on: LossOn = "completion", now: datetime | None = None
) -> Example:
    """One row, whole. `now` is what a chat template's `strftime_now` tells."""
    assert loss_on in get_args(LossOn), loss_on
    if row.messages:
        ids, trained = _conversation(row, tokenizer, loss_on, now)
    elif row.kind == "text":
        ids = _close(_open(row.text, tokenizer, row), tokenizer)
        trained = [True] * len(ids)
    else:
        prompt = _open(row.prompt, tokenizer, row)
        ids = _close(prompt + tokenizer.encode(row.completion, False), tokenizer)
        trained = [loss_on == "all"] * len(prompt) + [True] * (len(ids) - len(prompt))
    example = Example(
        input_ids=np.array(ids, dtype=np.int32), labels_mask=np.array(trained, dtype=bool), source=row.source
    )
    if not example.trained_tokens:
        raise row.source.error("has no token to train on", "remove the row, or give --train.loss-on all")
    return example


def fit(example: Example, *, max_length: int, too_long: TooLong) -> Example | None:
    """The example if it fits into `max_length` tokens, its prefix if it may be cut, None if it is dropped."""
    if len(example) <= max_length:
        return example
    if too_long == "error":
        raise example.source.error(
            f"is {len(example)} tokens long, {max_length} is the most",
            "shorten the row, raise --train.max-length, or give --train.too-long truncate (or drop)",
        )
    if too_long == "drop":
        return None
    ids, trained = example.input_ids[:max_length].copy(), example.labels_mask[:max_length].copy()
    cut = replace(example, input_ids=ids, labels_mask=trained, truncated=True)
    return cut if cut.trained_tokens else None


def stops(example: Example, tokenizer: Tokenizer) -> bool:
    """Whether the last trained token is one at which generation stops."""
    return int(example.input_ids[np.flatnonzero(example.labels_mask)[-1]]) in tokenizer.eos_token_ids


def check_served(row: Row, tokenizer: Tokenizer, *, now: datetime | None = None) -> None:
    """Refuses a conversation whose last answer generation would be asked for by another text than training shows: the
    messages before it, with the generation prompt, must be the beginning of the whole conversation."""
    turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    if tokenizer.chat_template is None or not turns:
        return
    conversation = _Conversation(row, tokenizer, tokenizer.chat_template, now)
    whole, _ = conversation.render(row.messages[: turns[-1] + 1])
    asked, _ = conversation.render(row.messages[: turns[-1]], add_generation_prompt=True)
    if not whole.startswith(asked):
        at = next(
            (i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), min(len(whole), len(asked))
        )
        raise row.source.error(
            f"generation would send {asked[at : at + 24]!r} where training shows {whole[at : at + 24]!r}",
            "use a chat template that renders both alike, or give rows of `prompt` + `completion` strings",
        )


def _open(text: str, tokenizer: Tokenizer, row: Row) -> list[int]:
    """A document's beginning: the tokenizer's specials before the text (BOS), none behind it, where it goes on."""
    ids = tokenizer.encode(text, True)
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids = ids[:-1]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise row.source.error(
            f"begins with {tokenizer.bos_token} twice: the tokenizer adds one", f"remove {tokenizer.bos_token} from it"
        )
    return ids


def _close(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TokenizerError(
            "has no EOS token, so no row could end",
            field="eos_token",
            remedy="set eos_token in tokenizer_config.json, or give rows of `messages`",
        )
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _conversation(
    row: Row, tokenizer: Tokenizer, loss_on: LossOn, now: datetime | None
) -> tuple[list[int], list[bool]]:
    if tokenizer.chat_template is None:
        raise TokenizerError(
            f"the tokenizer has no chat template, and {row.source} is a conversation",
            field="chat_template",
            remedy="use an instruct model, add chat_template.jinja to it, or give rows of `prompt` + `completion`",
        )
    conversation = _Conversation(row, tokenizer, tokenizer.chat_template, now)
    text, marked = conversation.render(row.messages)
    ids, offsets = tokenizer.encode_with_offsets(text, False)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise row.source.error(
            f"begins with {tokenizer.bos_token} twice: the chat template writes one",
            f"remove {tokenizer.bos_token} from the first message",
        )
    if loss_on == "all":
        return ids, [True] * len(ids)
    if marks_generation(tokenizer.chat_template):
        spans = conversation.answers_marked(marked)
    elif (shipped := conversation.with_marks(text)) is not None:
        spans = shipped
    else:
        spans = conversation.answers_by_prefix(text, last_only=loss_on == "last")
    spans = [span for span in spans if span[0] < span[1]]
    trained = [False] * len(ids)
    for span in spans[-1:] if loss_on == "last" else spans:
        for index in _with_stop(_tokens_in(span, offsets), ids, text, offsets, tokenizer.eos_token_ids):
            trained[index] = True
    return ids, trained


@dataclass(frozen=True)
class _Conversation:
    """A row's messages and the template that renders them."""

    row: Row
    tokenizer: Tokenizer
    template: str
    now: datetime | None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        kw: dict[str, Any] = {"tools": list(self.row.tools)} if self.row.tools else {}
        try:
            return render(
                self.template,
                messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.tokenizer.bos_token,
                eos_token=self.tokenizer.eos_token,
                now=self.now,
                **kw,
            )
        except DataError as error:
            raise self.row.source.error(error.message, error.remedy) from error

    def answers_marked(self, marked: list[Span]) -> list[Span]:
        """The template's own spans, without those of a conversational prompt."""
        if not self.row.prompt_messages:
            return marked
        _, before = self.render(self.row.messages[: self.row.prompt_messages])
        return marked[len(before) :]

    def with_marks(self, text: str) -> list[Span] | None:
        """The spans of the marked template that is known for this one, if it renders this very text."""
        known = training_template(self.template)
        # A conversation that the assistant begins is refused below
        if known is None or self.row.messages[0]["role"] == "assistant":
            return None
        marking = replace(self, template=known)
        same, marked = marking.render(self.row.messages)
        return marking.answers_marked(marked) if same == text else None

    def answers_by_prefix(self, text: str, last_only: bool) -> list[Span]:
        """Each assistant turn is what it adds: from the end of the conversation before it, with the generation prompt,
        to the end of the conversation with it. Both must be prefixes of the whole text, or training would show the
        model another context than generation does."""
        messages = self.row.messages
        turns = [
            index for index in range(self.row.prompt_messages, len(messages)) if messages[index]["role"] == "assistant"
        ]
        if turns and turns[0] == 0:
            raise self.row.source.error(
                "begins with an assistant message, which answers nothing", "begin with a user or system message"
            )
        spans: list[Span] = []
        for index in turns[-1:] if last_only else turns:
            before, _ = self.render(messages[:index], add_generation_prompt=True)
            upto = text if index == len(messages) - 1 else self.render(messages[: index + 1])[0]
            if not (upto.startswith(before) and text.startswith(upto)):
                raise self.row.source.error(
                    f"the chat template renders the messages before message {index + 1} otherwise than alone",
                    "use a template with {% generation %} marks, or give --train.loss-on last (or all)",
                )
            spans.append((len(before), len(upto)))
        return spans


def _tokens_in(span: Span, offsets: Sequence[Span]) -> range:
    """The tokens that hold a character of the span, one that begins before it included (as transformers counts).

    A byte-level tokenizer that trims its offsets (GPT-2's) leaves spaces out of them: such a gap belongs to the token
    behind it, which is the one that holds it.
    """
    first = last = -1
    reached = 0
    for index, (start, end) in enumerate(offsets):
        start, reached = min(start, reached), max(end, reached)
        if start < span[1] and end > span[0]:
            first, last = (index if first < 0 else first), index
    return range(first, last + 1) if first >= 0 else range(0)


def _with_stop(
    tokens: range, ids: Sequence[int], text: str, offsets: Sequence[Span], stop_ids: Collection[int]
) -> range:
    """The tokens of an assistant turn up to its stop token: without white space behind it, and with it where the
    template's `{% generation %}` mark ends right before it."""
    if not tokens:
        return tokens
    stop = next((index for index in reversed(tokens) if ids[index] in stop_ids), None)
    if stop is not None and not text[offsets[stop][1] : offsets[tokens[-1]][1]].strip():
        return range(tokens.start, stop + 1)
    if stop is None and tokens.stop < len(ids) and ids[tokens.stop] in stop_ids:
        return range(tokens.start, tokens.stop + 1)
    return tokens

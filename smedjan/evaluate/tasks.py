"""What `eval` measures on a row: its likelihood, the choice it would take, the answer it generates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from smedjan.data.collate import collate
from smedjan.data.formats import Row
from smedjan.data.mask import Example, tokenize_rows
from smedjan.evaluate.answers import judged
from smedjan.evaluate.rows import Choice, Question, asked, prompt_ids
from smedjan.evaluate.score import BATCH, Progress, example_losses, score_pairs
from smedjan.generate.batch import LOGITS, generate_many, grouped
from smedjan.generate.chat import template_stops
from smedjan.generate.sampling import Sampling
from smedjan.generate.text import TextStream
from smedjan.hf.tokenizer import Tokenizer
from smedjan.runtime.session import Session
from smedjan.train.evaluation import PAD_TO

SPARE = 4
"""New tokens allowed beyond the expected answer's, so that an answer that runs on is seen to be wrong."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are made. max_new_tokens None: as many as the expected answer has, and SPARE more."""

    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    batch_size: int = 32

    @property
    def told_by_one_pass(self) -> bool:
        """Whether an expected answer can be seen to be the one that would be generated without generating it."""
        return self.sampling.plain and self.max_new_tokens is None and not self.stop


@dataclass(kw_only=True)
class Measured:
    """metrics: by name, each row's sum and count: the metric is their sums' ratio. rows: each row's outcome."""

    metrics: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, values: Sequence[float], counts: Sequence[float] | None = None) -> None:
        self.metrics[name] = (list(values), [1.0] * len(values) if counts is None else list(counts))

    def tell(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """Each row's further outcomes."""
        rows = self.rows or [{} for _ in outcomes]
        self.rows = [{**row, **outcome} for row, outcome in zip(rows, outcomes, strict=True)]


def likelihood(
    made: Measured, session: Session, tokenizer: Tokenizer, rows: Sequence[Row], on_row: Progress | None
) -> None:
    """nll: -log p of the trained tokens, each given all before it."""
    examples = tokenize_rows(rows, tokenizer, max_length=session.config.max_position_embeddings).examples
    losses = example_losses(session, examples, on_row=on_row)
    tokens = [example.trained_tokens for example in examples]
    made.add("nll", losses, tokens)
    made.tell([{"nll": loss / count, "tokens": count} for loss, count in zip(losses, tokens, strict=True)])


def choice(
    made: Measured, session: Session, tokenizer: Tokenizer, rows: Sequence[Choice], on_row: Progress | None
) -> None:
    """The likeliest choice, by log p of all its tokens given the prompt (lm-evaluation-harness' `acc`), by that of a
    byte (its `acc_bytes`, and `acc_norm` where every character is one) and by that of a token."""
    pairs, starts, context = [], [0], session.config.max_position_embeddings
    for row in rows:
        given = _prompt(tokenizer, row)
        for text in row.choices:
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if not tokens or len(given) + len(tokens) > context:
                raise row.source.error(
                    f"prompt and choice are {len(given)} and {len(tokens)} tokens, for a context of {context}",
                    "shorten the row, or remove it",
                )
            pairs.append((given, tokens))
        starts.append(len(pairs))
    scores = score_pairs(session, pairs, on_row=on_row)
    outcomes = []
    for row, start, end in zip(rows, starts[:-1], starts[1:], strict=True):
        logprobs = np.array([score.logprob for score in scores[start:end]])
        by_bytes = logprobs / [len(text.encode()) for text in row.choices]
        by_tokens = logprobs / [score.tokens for score in scores[start:end]]
        taken = {"": logprobs, "_bytes": by_bytes, "_tokens": by_tokens}
        outcome = {"logprobs": logprobs.tolist(), "answer": row.answer}
        outcome.update({f"chosen{norm}": int(values.argmax()) for norm, values in taken.items()})
        outcomes.append(outcome)
    for norm in ("", "_bytes", "_tokens"):
        made.add(f"accuracy{norm}", [float(outcome[f"chosen{norm}"] == outcome["answer"]) for outcome in outcomes])
    first = Counter(row.answer for row in rows)
    made.baselines.update(
        chance=sum(1 / len(row.choices) for row in rows) / len(rows),
        commonest=first.most_common(1)[0][1] / len(rows),
    )
    made.tell(outcomes)


def generation(
    made: Measured,
    session: Session,
    tokenizer: Tokenizer,
    rows: Sequence[Question | Row],
    decoding: Decoding,
    on_row: Progress | None,
) -> None:
    """The answers to the rows' prompts, and how right they are."""
    found = generated(session, tokenizer, rows, decoding, on_row=on_row)
    wanted = [asking[1] for row in rows if (asking := asked(row)) is not None]
    verdicts = [judged(answer, references) for answer, references in zip(found, wanted, strict=True)]
    for name in verdicts[0]:
        made.add(name, [verdict[name] for verdict in verdicts])
    commonest = Counter(references[0].strip() for references in wanted).most_common(1)[0][0]
    made.baselines["commonest"] = sum(judged(commonest, refs)["exact_match"] for refs in wanted) / len(wanted)
    made.tell(
        [
            {"answer": answer, "expected": list(references), **verdict}
            for answer, references, verdict in zip(found, wanted, verdicts, strict=True)
        ]
    )


def generated(
    session: Session,
    tokenizer: Tokenizer,
    rows: Sequence[Question | Row],
    decoding: Decoding,
    *,
    on_row: Progress | None = None,
) -> list[str]:
    """The answer to each row's prompt.

    Where the likeliest token at every place of the expected completion, its stop token included, is the expected one,
    greedy decoding gives the completion: one pass over a batch finds that out. Only the other rows are decoded.
    """
    answers: dict[int, str] = {}
    if decoding.told_by_one_pass:
        plain = {index: row for index, row in enumerate(rows) if isinstance(row, Row) and not row.messages}
        answers.update({index: plain[index].completion for index in _foretold(session, tokenizer, plain)})
        if on_row is not None:
            on_row(len(answers), len(rows))
    rest = [index for index in range(len(rows)) if index not in answers]
    told = len(answers)

    def counted(done: int, _: int) -> None:
        if on_row is not None:
            on_row(told + done, len(rows))

    answers.update(zip(rest, _decoded(session, tokenizer, rows, rest, decoding, counted), strict=True))
    return [answers[index] for index in range(len(rows))]


def _foretold(session: Session, tokenizer: Tokenizer, rows: dict[int, Row]) -> list[int]:
    """Those of the rows whose trained tokens are all the likeliest ones."""
    if not rows:
        return []
    config, indices = session.config, list(rows)
    examples: Sequence[Example] = tokenize_rows(
        rows.values(), tokenizer, max_length=config.max_position_embeddings
    ).examples
    right = []
    for group in grouped(list(map(len, examples)), batch_size=BATCH, tokens=LOGITS // config.vocab_size):
        batch = collate([(examples[n],) for n in group], max_length=config.max_position_embeddings, pad_to=PAD_TO)
        hit = session.predictions(batch) == batch.labels.reshape(-1)[batch.loss_rows]
        row_of = batch.loss_rows // batch.input_ids.shape[1]
        right += [indices[index] for row, index in enumerate(group) if hit[row_of == row].all()]
    return right


def _decoded(
    session: Session,
    tokenizer: Tokenizer,
    rows: Sequence[Question | Row],
    indices: Sequence[int],
    decoding: Decoding,
    on_row: Progress,
) -> list[str]:
    """Those of `indices`, in batches. Row i draws with seed + i: what it gets hangs on no other row."""
    context, sampling = session.config.max_position_embeddings, decoding.sampling
    prompts, most, streams = [], [], []
    stop = {*tokenizer.eos_token_ids, *session.config.eos_token_id}
    if any(not isinstance((asked(rows[index]) or ("",))[0], str) for index in indices):
        stop |= {*template_stops(tokenizer)}
    for index in indices:
        row = rows[index]
        prompt = _prompt(tokenizer, row)
        if len(prompt) >= context:
            raise row.source.error(
                f"its prompt is {len(prompt)} tokens long, and the context ends at {context}", "shorten the prompt"
            )
        asking = asked(row)
        assert asking is not None
        room = decoding.max_new_tokens or SPARE + max(
            len(tokenizer.encode(reference, add_special_tokens=False)) for reference in asking[1]
        )
        prompts.append(prompt)
        most.append(min(room, context - len(prompt)))
        streams.append(TextStream(tokenizer.decode, decoding.stop))

    def ended(row: int, token: int) -> bool:
        if token not in stop:
            streams[row].push(token)
        return streams[row].stopped

    generate_many(
        session,
        prompts,
        max_new_tokens=most,
        stop=stop,
        sampling=[replace(sampling, seed=sampling.seed + index) for index in indices],
        batch_size=decoding.batch_size,
        ended=ended,
        on_row=on_row,
    )
    for stream in streams:
        stream.finish()
    return [stream.text for stream in streams]


def _prompt(tokenizer: Tokenizer, row: Choice | Question | Row) -> list[int]:
    prompt = row.prompt if isinstance(row, Choice) else (asked(row) or ("",))[0]
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise row.source.error("its prompt is no token", "write a prompt")
    return ids

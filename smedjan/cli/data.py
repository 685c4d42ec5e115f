"""`smedjan data inspect FILE --model DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, rendered
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.data.inspect import Inspection, Piece


def inspect(
    file: Annotated[
        Path, Parameter(help="rows: jsonl, json, csv, parquet, arrow, a folder of splits, or a hub data set")
    ],
    /,
    *,
    model: Annotated[str, Parameter(help="whose tokenizer and chat template they are for")],
    split: Annotated[Literal["train", "valid", "test"], Parameter(help="of a folder")] = "train",
    rows: Annotated[int, Parameter(help="rows to show")] = 3,
    max_length: Annotated[int | None, Parameter(help="most tokens of a row (default as in finetune)")] = None,
    loss_on: Annotated[
        Literal["completion", "last", "all"], Parameter(help="what is trained, as in finetune")
    ] = "completion",
    too_long: Annotated[Literal["error", "truncate", "drop"], Parameter(help="as in finetune")] = "error",
    broken: Annotated[Literal["error", "drop"], Parameter(help="as in finetune")] = "error",
    html: Annotated[Path | None, Parameter(help="write the rows as a page")] = None,
    common: Common = COMMON,
) -> Outcome:
    """Show rows as the tokens a run would train on, the trained ones marked, and refuse what would not train well.

    Example: smedjan data inspect rows.jsonl --model smollm2
    """
    from smedjan.data.formats import Broken, conversion, left_out, stream_rows
    from smedjan.data.inspect import inspect_rows
    from smedjan.hf.dataset_hub import data_path
    from smedjan.hf.load import open_model
    from smedjan.hf.tokenizer import load_tokenizer
    from smedjan.train.config import TrainConfig

    if rows < 0:
        raise ConfigError(f"is {rows}", field="rows", remedy="give 0 or more")
    files = open_model(model)
    config = TrainConfig(max_length=max_length, loss_on=loss_on, too_long=too_long, broken=broken)
    tokenizer, left = load_tokenizer(files.path), Broken(broken, flag="--broken")
    chat = tokenizer.chat_template is not None
    found = inspect_rows(
        stream_rows(data_path(file, split, common.note), split, chat=chat, broken=left),
        tokenizer,
        max_length=config.max_length_for(files.config.max_position_embeddings),
        loss_on=loss_on,
        too_long=too_long,
        broken=left,
        samples=rows,
    )
    if said := left_out(left.count, left.first):
        common.note(said)
    if said := conversion(found.converted):
        common.note(f"{file}: {said}")
    written = None if html is None else _write(html, found, file)
    return Outcome(fields=_fields(found) | {"html": written}, text="\n".join(_lines(found, written)))


def _write(html: Path, found: Inspection, file: Path) -> Path:
    from smedjan.report.rows import write_rows

    try:
        return write_rows(html, found, title=file.name)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=html, field="html", remedy="check it") from error


def _fields(found: Inspection) -> dict[str, Any]:
    counts = found.counts
    return {
        "rows": counts.rows,
        "unstopped": counts.unstopped,
        "converted": found.converted,
        "tokens": found.tokens,
        "trained_tokens": found.trained_tokens,
        "trained_share": found.trained_share,
        "longest": found.longest,
        "lengths": found.lengths,
        "samples": found.samples,
    }


def _lines(found: Inspection, html: Path | None) -> Iterator[str]:
    from smedjan.report.rows import figures

    colours = sys.stdout.isatty()
    for sample in found.samples:
        yield f"{sample.source}{', truncated' if sample.truncated else ''}"
        yield _tokens(sample.pieces, colours)
        yield ""
    for name, value in figures(found):
        yield f"{name:<9}{value}"
    if html is not None:
        yield str(html)


def _tokens(pieces: tuple[Piece, ...], colours: bool) -> str:
    """Trained tokens green on a terminal, every second one underlined so that each is seen; in a pipe what is trained
    stands between brackets."""
    from rich.text import Text

    line, within = Text(), False
    for index, piece in enumerate(pieces):
        if not colours and piece.trained != within:
            line.append("\u27e6" if piece.trained else "\u27e7")
        within = piece.trained
        style = ("bold green" if piece.trained else "dim") + (" underline" if index % 2 else "")
        line.append(_visible(piece.text), style=style)
    if within and not colours:
        line.append("\u27e7")
    return rendered(line, width=10**6)


def _visible(text: str) -> str:
    """Line ends seen as well as made; whatever else a terminal would obey, spelled out."""
    return "".join(
        "\u23ce\n" if char == "\n" else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )

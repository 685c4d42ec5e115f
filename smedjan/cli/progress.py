"""What a training run shows on stderr: its header, then a bar with step, loss, gradient norm, learning rate, tokens/s,
MFU, memory and the time left, and above it evaluations and samples as they come."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from smedjan.report.scale import duration


class Bar:
    """Within it, call it with every event of a run. `total` is a guess where an event carries `total_steps`."""

    def __init__(self, total: int | None) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total, figures="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # One that never began ends with an empty line all the same
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        # From the first event on: an error before it is one line, without an empty bar above
        self._progress.start()
        if "header" in event:
            self._show(_table(event["header"]))
            return
        if "samples" in event:
            self._show(_samples(event["step"], event["samples"]))
            return
        if "fp8" in event or "int8_forward" in event:
            from smedjan.train.parts import EIGHT_BITS

            way = next(each for each in EIGHT_BITS if each.key in event)
            self._progress.console.print(way.line(event[way.key], on="the first batch"), highlight=False)
            return
        if "eval_loss" in event:
            shown = f"step {event['step']}: eval loss {event['eval_loss']:.4f}"
            if event.get("best_step") not in (None, event["step"]):
                shown += f" (lowest {event['best_eval_loss']:.4f} after step {event['best_step']})"
            if event.get("stopped_early"):
                shown += "; stopped early"
            self._progress.console.print(shown, highlight=False)
            return
        mfu = "" if event.get("mfu") is None else f"{event['mfu']:.0%} MFU  "
        # Two lines, which fit in 80 columns
        figures = (
            f"loss {event['loss']:.4f}  norm {event['grad_norm']:.2f}  {duration(event['eta_s'])} left\n"
            f"lr {event['lr']:.1e}  {event['tokens_per_s']:,.0f} tokens/s  {mfu}{event['peak_bytes'] / 2**30:.1f} GiB"
        )
        if event.get("skipped"):
            figures += f"  {event['skipped']} skipped"
        total = event.get("total_steps")
        self._progress.update(
            self._task, completed=event["step"], figures=figures, **({} if total is None else {"total": total})
        )

    def _show(self, made: RenderableType) -> None:
        self._progress.console.print(made, highlight=False)


def _table(header: dict[str, Any]) -> Table:
    from smedjan.train.header import lines

    made = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in lines(header):
        made.add_row(name, Text(value))
    return made


def _samples(step: int, samples: list[dict[str, str]]) -> Text:
    """Each prompt's end, dim, and what the model goes on with."""
    made = Text(f"step {step}, samples:")
    for sample in samples:
        made.append("\n  ")
        made.append(_short(sample["prompt"], keep_end=True), style="dim")
        made.append(" \u2192 ", style="bold")
        made.append(_short(sample["text"], keep_end=False))
    return made


def _short(text: str, *, keep_end: bool, most: int = 60) -> str:
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return f"\u2026{line[-most:]}" if keep_end else f"{line[:most]}\u2026"

"""The bar of a training run: step, loss, learning rate, tokens/s, time left and memory, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Within it, call it with every event of a run. `total` is a guess where an event carries `total_steps`."""

    def __init__(self, total: int | None) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total, figures="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        # From the first event on: an error before it is one line, without an empty bar above
        self._progress.start()
        if "fp8" in event:
            from smedjan.train.fp8 import line

            self._progress.console.print(line(event["fp8"], on="the first batch"), highlight=False)
            return
        if "eval_loss" in event:
            shown = f"step {event['step']}: eval loss {event['eval_loss']:.4f}"
            if event.get("best_step") not in (None, event["step"]):
                shown += f" (lowest {event['best_eval_loss']:.4f} after step {event['best_step']})"
            if event.get("stopped_early"):
                shown += "; stopped early"
            self._progress.console.print(shown, highlight=False)
            return
        figures = (
            f"loss {event['loss']:.4f}  lr {event['lr']:.2e}  {event['tokens_per_s']:,.0f} tokens/s  "
            f"{event['peak_bytes'] / 2**30:.1f} GiB"
        )
        if event.get("skipped"):
            figures += f"  {event['skipped']} skipped"
        total = event.get("total_steps")
        self._progress.update(
            self._task, completed=event["step"], figures=figures, **({} if total is None else {"total": total})
        )

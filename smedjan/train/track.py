"""Trackers, for runs that ask for them: `--train.track tensorboard,trackio,wandb`. Each is an extra.

All get what log.jsonl gets: the header as the run's configuration, numbers as `train/...` and `eval/...` by step, and
samples as text. TensorBoard's files go to RUN/tensorboard; the other two keep theirs where they are told to
(`WANDB_MODE=offline` needs no network). Nothing here is imported, and nothing sent anywhere, unless it is asked for.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from smedjan.errors import ConfigError, nearest
from smedjan.train.log import Event

FIELD = "train.track"

PROJECT = "smedjan"


class Tracker(Protocol):
    """Made when the run writes its header, before its first step."""

    def write(self, event: Event) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by the names that dashboards group: `train/loss`, `eval/loss`."""
    if "eval_loss" in event:
        return {"eval/loss": event["eval_loss"]}
    if "loss" not in event:
        return {}
    return {
        f"train/{name}": value
        for name, value in event.items()
        if name not in ("step", "total_steps") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def as_text(samples: Sequence[dict[str, str]]) -> str:
    """Markdown: code blocks, fenced by more backticks than any text has in a row."""
    longest = max((len(run) for each in samples for text in each.values() for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    blocks = (f"{fence}\n{text}\n{fence}" for each in samples for text in (each["prompt"], each["text"]))
    return "\n\n".join(blocks)


class TensorBoard:
    """Event files by the package's own writer: no torch, no TensorFlow."""

    def __init__(self, header: dict[str, Any], out: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
        from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._log, self._tensor, self._shape = event_pb2.SessionLog, tensor_pb2.TensorProto, tensor_shape_pb2
        plugin = summary_pb2.SummaryMetadata.PluginData(
            plugin_name="text", content=TextPluginData(version=0).SerializeToString()
        )
        self._text = summary_pb2.SummaryMetadata(plugin_data=plugin)
        self._writer = EventFileWriter(str(out / "tensorboard"), flush_secs=5)
        # What an earlier leg logged past its checkpoint is purged by TensorBoard from here on.
        started = self._log(status=self._log.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=started))
        from smedjan.train.header import lines

        table = "\n".join(f"| {name} | {value} |" for name, value in lines(header))
        self._add(step, [self._written("run", f"| | |\n|---|---|\n{table}")])

    def write(self, event: Event) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars(event).items()]
        if "samples" in event:
            values.append(self._written("samples", as_text(event["samples"])))
        if values:
            self._add(event["step"], values)

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def _written(self, tag: str, text: str) -> Any:
        one = self._shape.TensorShapeProto(dim=[self._shape.TensorShapeProto.Dim(size=1)])
        tensor = self._tensor(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=one)
        return self._summary.Value(tag=f"{tag}/text_summary", metadata=self._text, tensor=tensor)


class Trackio:
    """A local database, shown by `trackio show`."""

    def __init__(self, header: dict[str, Any], out: Path, step: int) -> None:
        self._trackio = import_module("trackio")
        self._trackio.init(project=PROJECT, name=_identity(header, out), config=header, resume="allow")

    def write(self, event: Event) -> None:
        values: dict[str, Any] = dict(scalars(event))
        if "samples" in event:
            values["samples"] = self._trackio.Markdown(as_text(event["samples"]))
        if values:
            self._trackio.log(values, step=event["step"])

    def close(self, *, failed: bool) -> None:
        self._trackio.finish()


class Wandb:
    """One run of wandb for one run directory, resumed with it. Its own settings say where it goes."""

    def __init__(self, header: dict[str, Any], out: Path, step: int) -> None:
        self._wandb = import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_identity(header, out),
            name=out.resolve().name,
            dir=str(out),
            config=header,
            resume="allow",
        )

    def write(self, event: Event) -> None:
        values: dict[str, Any] = dict(scalars(event))
        if "samples" in event:
            rows = [[event["step"], each["prompt"], each["text"]] for each in event["samples"]]
            values["samples"] = self._wandb.Table(columns=["step", "prompt", "text"], data=rows)
        if values:
            self._run.log(values, step=event["step"])

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[dict[str, Any], Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check(names: Sequence[str]) -> None:
    """An error for a name that is no tracker, or one whose package is not there."""
    for name in names:
        if name not in TRACKERS:
            close = nearest(name, set(TRACKERS))
            raise ConfigError(
                f"{name!r} is not one of {', '.join(TRACKERS)}",
                field=FIELD,
                remedy=f"did you mean {close}?" if close else "give one of them",
            )
        try:
            import_module(name)
        except ImportError as cause:  # it is not there, or something that it needs is not
            raise ConfigError(
                f"{name} cannot be imported: {cause}",
                field=FIELD,
                remedy=f"pip install 'smedjan[{name}]', or leave it out",
            ) from cause


@contextmanager
def tracked(
    names: Sequence[str] | None, out: Path, on_step: Callable[[Event], None] | None
) -> Iterator[Callable[[Event], None] | None]:
    """A listener that gives every event to `on_step` and, from the header on, to the trackers of these names."""
    if not names:
        yield on_step
        return
    check(names)
    made: list[Tracker] = []

    def listener(event: Event) -> None:
        for tracker in made:
            tracker.write(event)
        if "header" in event:
            for name in names:
                with redirect_stdout(sys.stderr):  # stdout is the command's own
                    tracker = TRACKERS[name](event["header"], out, event["step"])
                made.append(tracker)
                closing.push(partial(_close, tracker))
        if on_step is not None:
            on_step(event)

    with ExitStack() as closing:
        yield listener


def _close(tracker: Tracker, kind: type[BaseException] | None, *_: object) -> None:
    with redirect_stdout(sys.stderr):
        tracker.close(failed=kind is not None)


def _identity(header: dict[str, Any], out: Path) -> str:
    """Of a run directory and what was started in it: the same after a resume, another for another run."""
    told = f"{out.resolve()} {header['config_hash']} {header['started']}"
    return f"{out.resolve().name}-{sha256(told.encode()).hexdigest()[:8]}"

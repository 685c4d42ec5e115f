"""The processes of a run, as torchrun and accelerate launch start them: number RANK of WORLD_SIZE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smedjan.errors import ConfigError, Elsewhere, SmedjanError

if TYPE_CHECKING:
    from smedjan.backends.base import Backend
    from smedjan.backends.collective import Collective


def rank_and_world() -> tuple[int, int]:
    """Which process this is, from 0, of how many."""
    world = _number("WORLD_SIZE", "1")
    if world <= 1:
        return 0, 1
    rank = _number("RANK", "")
    if rank >= world:
        raise ConfigError(f"{rank} of {world} processes", field="RANK", remedy="start by torchrun or accelerate launch")
    return rank, world


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is no number", field=name, remedy="start by torchrun or accelerate launch")
    return int(text)


def first() -> bool:
    """Whether this is the process that speaks for the run."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def together(backend: Backend) -> Iterator[Collective]:
    """The processes of this run. An error that leaves the block in one of them leaves it in all: in the lowest of those
    that have one as it is, in the others as `Elsewhere`."""
    from smedjan.backends.collective import Alone, Lost  # every command asks for `first`

    rank, world = rank_and_world()
    if world == 1:
        yield Alone()
        return
    group = backend.collective(rank=rank, world=world)
    try:
        yield group
    except (Elsewhere, Lost):
        raise
    except SmedjanError as error:
        group.fail(error)
        raise
    finally:
        group.close()

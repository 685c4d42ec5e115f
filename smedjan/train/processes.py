"""The processes of a run: number RANK of WORLD_SIZE, as torchrun and accelerate launch start them, or number MLX_RANK
of the ring in MLX_HOSTFILE, as mlx.launch does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smedjan.errors import ConfigError, Elsewhere, SmedjanError

if TYPE_CHECKING:
    from smedjan.backends.base import Backend
    from smedjan.backends.collective import Collective


TORCH, MLX = "start by torchrun or accelerate launch", "start by mlx.launch --backend ring"


def rank_and_world() -> tuple[int, int]:
    """Which process this is, from 0, of how many."""
    name, remedy = "RANK", TORCH
    world = _number("WORLD_SIZE", "1", remedy)
    if world <= 1 and "MLX_RANK" in os.environ:
        name, remedy = "MLX_RANK", MLX
        world = _ring()
    if world <= 1:
        return 0, 1
    rank = _number(name, "", remedy)
    if rank >= world:
        raise ConfigError(f"{rank} of {world} processes", field=name, remedy=remedy)
    return rank, world


def _number(name: str, default: str, remedy: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is no number", field=name, remedy=remedy)
    return int(text)


def _ring() -> int:
    """How many processes the file of mlx.launch's ring backend names: a list, with the addresses of each."""
    file = os.environ.get("MLX_HOSTFILE")
    if file is None:
        raise ConfigError("MLX_RANK is set, and no ring is named", field="MLX_HOSTFILE", remedy=MLX)
    try:
        with open(file, encoding="utf-8") as opened:
            hosts = json.load(opened)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"cannot be read: {cause}", file=file, field="MLX_HOSTFILE", remedy=MLX) from cause
    if not isinstance(hosts, list) or not hosts:
        raise ConfigError("is no list of processes' addresses", file=file, field="MLX_HOSTFILE", remedy=MLX)
    return len(hosts)


def first() -> bool:
    """Whether this is the process that speaks for the run."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return os.environ.get("RANK", "0") == "0"
    return os.environ.get("MLX_RANK", "0") == "0"


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

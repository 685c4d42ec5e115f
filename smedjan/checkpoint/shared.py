"""State that the processes of a run write together: one shard each, and an index over them.

DIR/optimizer-00001-of-00002.safetensors, ...           the tensors of process 0, ...
DIR/optimizer.safetensors.index.json                    tensor -> shard, as model directories have it

One process writes DIR/optimizer.safetensors. Whichever is there is read by any number of processes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_file, open_shards, save_file

STEM = "optimizer"
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"

Digest = Callable[[Mapping[str, RawTensor]], str]


class Peers(Protocol):
    """The processes of a run (`backends.collective.Collective`): what each gives, by rank, when all have given."""

    rank: int
    world: int

    def exchange(self, value: Any = None) -> list[Any]: ...


class One:
    """A process without others."""

    rank, world = 0, 1

    def exchange(self, value: Any = None) -> list[Any]:
        return [value]


def shares(sizes: Mapping[str, int], world: int) -> list[list[str]]:
    """Names in their order, cut into `world` runs of about equal bytes; some may be empty.

    A name belongs to the run in which its middle byte lies.
    """
    total = max(sum(sizes.values()), 1)
    ends = [total * (rank + 1) / world for rank in range(world)]
    made: list[list[str]] = [[] for _ in range(world)]
    for (name, size), end in zip(sizes.items(), accumulate(sizes.values()), strict=True):
        made[min(bisect_right(ends, end - size / 2), world - 1)].append(name)
    return made


def write_state(folder: Path, tensors: Mapping[str, RawTensor], peers: Peers, digest: Digest) -> list[str]:
    """Writes this process's tensors into `folder`, process 0 the index. The shards' digests, when all are there."""
    ours = {"names": list(tensors), "digest": digest(tensors)}
    save_file(folder / shard(peers.rank, peers.world), tensors)
    said = peers.exchange(ours)
    if peers.rank == 0 and peers.world > 1:
        weight_map = {name: shard(rank, peers.world) for rank, each in enumerate(said) for name in each["names"]}
        write_atomic(folder / INDEX, (json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n").encode())
    return [each["digest"] for each in said]


def read_state(folder: Path) -> tuple[Mapping[str, RawTensor], list[tuple[Path, Mapping[str, RawTensor]]]]:
    """All tensors, and those of each file."""
    if not (folder / INDEX).is_file():
        tensors = open_file(folder / SINGLE)
        return tensors, [(folder / SINGLE, tensors)]
    files = sorted(folder.glob(f"{STEM}-*-of-*.safetensors"))
    return open_shards(folder, folder / INDEX), [(file, open_file(file)) for file in files]


def shard(rank: int, world: int) -> str:
    return SINGLE if world == 1 else f"{STEM}-{rank + 1:05d}-of-{world:05d}.safetensors"

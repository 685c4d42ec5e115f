"""Checkpoints of a run, whole after a kill at any instant.

RUN/checkpoints/step-00000010/       WEIGHTS.safetensors, smedjan/optimizer.safetensors, smedjan/state.json
RUN/smedjan/latest.json              {schema, step, path}: the checkpoint to go on from

A checkpoint directory appears under its name by one rename, complete; then the pointer is replaced by another. One
process writes a run, but for the optimizer's state, of which each process of a run writes its share (`shared`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from smedjan.checkpoint.atomic import new_directory, remove_directory, remove_stale, write_atomic, write_errors
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.checkpoint.safetensors import open_file, save_file
from smedjan.checkpoint.shared import One, Peers, read_state, write_state
from smedjan.errors import CheckpointError
from smedjan.models.config import read_json_object

SCHEMA = 1
INNER = "smedjan"
_OURS = ("schema", "step", "weights_name", "weights_sha256", "optimizer_sha256")
_NAME = re.compile(r"step-(\d{8,})(?:-r(\d+))?")
_GO_BACK = "delete this checkpoint and latest.json to go on from an older one, or start again"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run at the end of `step`. The tensors are views of mapped files; `state` is what save_checkpoint was given."""

    step: int
    path: Path
    weights: Mapping[str, RawTensor]
    optimizer: Mapping[str, RawTensor]
    state: dict[str, Any]


def sha256_of(tensors: Mapping[str, RawTensor]) -> str:
    """Hex SHA-256 over (name, dtype, shape, bytes) of every tensor, sorted by name."""
    digest = sha256()
    for name, spec in sorted(specs_of(tensors).items()):
        digest.update(json.dumps([name, spec.dtype, list(spec.shape)]).encode() + b"\n")
        for part in tensors[name].parts():
            digest.update(part.data)
    return digest.hexdigest()


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found, path
    return int(found[1]), int(found[2] or 0)


def _checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_order)


def save_checkpoint(
    run: Path,
    step: int,
    *,
    weights: Mapping[str, RawTensor],
    optimizer: Mapping[str, RawTensor],
    state: dict[str, Any],
    weights_name: str = "model.safetensors",
    keep: int = 2,
    peers: Peers | None = None,
    best: int | None = None,
) -> Path:
    """Write a checkpoint, point to it, delete all but the newest `keep` and that of step `best`. `state` is JSON.

    All of `peers` call it, each with its share of the optimizer's tensors, on one file system; process 0 writes the
    rest. It returns when the checkpoint is whole.
    """
    peers = peers or One()
    if peers.rank > 0:
        return _write_share(run, optimizer, peers)
    assert keep >= 1, keep
    assert not set(state) & set(_OURS), f"state may not use {_OURS}"
    folder, inner = run / "checkpoints", run / INNER
    with write_errors(run):
        folder.mkdir(parents=True, exist_ok=True)
        inner.mkdir(exist_ok=True)
        remove_stale(folder)
        remove_stale(inner)
    path = folder / f"step-{step:08d}"
    tries = 0
    while path.exists():
        # Never write over a checkpoint that the pointer may name: a kill between would leave none.
        tries += 1
        path = folder / f"step-{step:08d}-r{tries}"
    ours = {
        "schema": SCHEMA,
        "step": step,
        "weights_name": weights_name,
        "weights_sha256": sha256_of(weights),
    }
    with new_directory(path) as partial:
        (partial / INNER).mkdir()
        peers.exchange({"partial": str(partial), "path": str(path)})
        save_file(partial / weights_name, weights)
        digests = write_state(partial / INNER, optimizer, peers, sha256_of)
        ours["optimizer_sha256"] = digests[0] if peers.world == 1 else digests
        write_atomic(partial / INNER / "state.json", _json({**ours, **state}))
    pointer = {"schema": SCHEMA, "step": step, "path": f"checkpoints/{path.name}"}
    write_atomic(inner / "latest.json", _json(pointer))
    # A higher step than the one just written belongs to a future that this run has left.
    past = [old for old in _checkpoints(run) if _order(old) <= _order(path)]
    keepers = [*past[-keep:], *[old for old in past if _order(old)[0] == best][-1:]]
    with write_errors(folder):
        for old in _checkpoints(run):
            if old not in keepers:
                remove_directory(old)
    peers.exchange()
    return path


def _write_share(run: Path, optimizer: Mapping[str, RawTensor], peers: Peers) -> Path:
    """What the other processes do of a checkpoint that process 0 writes."""
    where, *_ = peers.exchange()
    partial, path = Path(where["partial"]), Path(where["path"])
    if not (partial / INNER).is_dir():
        raise CheckpointError(
            f"process {peers.rank} does not see what process 0 writes",
            file=run,
            remedy="give an --out that all machines share",
        )
    try:
        write_state(partial / INNER, optimizer, peers, sha256_of)
    except CheckpointError as error:
        if error.file is not None:
            error.file = error.file.replace(str(partial), str(path))
        raise
    peers.exchange()
    return path


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def load_checkpoint(run: Path) -> Checkpoint | None:
    """The checkpoint to go on from, verified against its hashes, or None where there is none."""
    pointer = run / INNER / "latest.json"
    if pointer.is_file():
        name = read_json_object(pointer, CheckpointError).get("path")
        if (
            not isinstance(name, str)
            or not name.startswith("checkpoints/")
            or not _NAME.fullmatch(name.removeprefix("checkpoints/"))
        ):
            raise CheckpointError(
                f"{name!r} is not the path of a checkpoint", file=pointer, field="path", remedy="delete latest.json"
            )
        path = run / name
        if not path.is_dir():
            raise CheckpointError("the checkpoint is gone", file=path, remedy="delete latest.json to use another")
        return _load(path)
    # A first save that was killed before it could point to the directory it had completed.
    found = _checkpoints(run)
    return _load(found[-1]) if found else None


def checkpoint_of(run: Path, step: int) -> Checkpoint:
    """The checkpoint of one step, verified against its hashes."""
    found = [path for path in _checkpoints(run) if _order(path)[0] == step]
    if not found:
        raise CheckpointError(
            f"the checkpoint of step {step} is gone", file=run / "checkpoints", remedy="start the run again"
        )
    return _load(found[-1])


def _load(path: Path) -> Checkpoint:
    file = path / INNER / "state.json"
    state = read_json_object(file, CheckpointError)
    if state.get("schema") != SCHEMA:
        raise CheckpointError(
            f"is {state.get('schema')!r}, this version reads {SCHEMA}", file=file, field="schema", remedy=_GO_BACK
        )
    step, weights_name = state.get("step"), state.get("weights_name")
    if type(step) is not int or not isinstance(weights_name, str) or Path(weights_name).name != weights_name:
        raise CheckpointError("step or weights_name is damaged", file=file, field="step", remedy=_GO_BACK)
    weights = open_file(path / weights_name)
    optimizer, files = read_state(path / INNER)
    digests = state.get("optimizer_sha256")
    digests = digests if isinstance(digests, list) else [digests]
    if len(digests) != len(files):
        raise CheckpointError(
            f"{len(files)} files of the optimizer's state, and digests of {len(digests)}",
            file=file,
            field="optimizer_sha256",
            remedy=_GO_BACK,
        )
    for field, tensors, where, digest in (
        ("weights_sha256", weights, path / weights_name, state.get("weights_sha256")),
        *(("optimizer_sha256", each, where, digest) for (where, each), digest in zip(files, digests, strict=True)),
    ):
        if sha256_of(tensors) != digest:
            raise CheckpointError(
                f"the checkpoint is damaged: its bytes do not match {field}", file=where, field=field, remedy=_GO_BACK
            )
    given = {key: value for key, value in state.items() if key not in _OURS}
    return Checkpoint(step=step, path=path, weights=weights, optimizer=optimizer, state=given)

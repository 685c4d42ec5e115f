"""What the adapters of a run start from, where that is a part of their weights (`hf/pissa.py`).

It stays in the run directory: an SVD has other bits on another machine, or with another number of threads, and a run
that goes on must go on over the same residual.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from smedjan.backends.base import Array
from smedjan.backends.collective import Collective
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_file, save_file
from smedjan.hf import pissa
from smedjan.hf.load import ModelFiles
from smedjan.passes.lora import Lora
from smedjan.runtime.adapters import magnitudes
from smedjan.runtime.session import Session
from smedjan.train.config import FinetuneConfig


def files_under(files: ModelFiles, lora: Lora | None, start: Mapping[str, RawTensor]) -> ModelFiles:
    """The model whose weights lack what their adapters start as."""
    if not start:
        return files
    assert lora is not None
    return replace(files, tensors=pissa.residual(lora, files.tensors, start))


def shared(group: Collective, make: Callable[[], Mapping[str, RawTensor]]) -> Mapping[str, RawTensor]:
    """What `make` gives in the first process, in all of them: another processor may give other bits."""
    if group.world == 1:
        return make()
    own = {} if group.rank else make()
    said = group.exchange([[n, t.dtype, t.shape, b64encode(t.data).decode()] for n, t in own.items()])[0]
    return {
        name: RawTensor(dtype=dtype, shape=tuple(shape), data=memoryview(b64decode(text)))
        for name, dtype, shape, text in said
    }


def first_magnitudes(session: Session, group: Collective | None) -> Mapping[str, Array]:
    """DoRA's, by the first process's norms."""
    backend = session.backend
    if group is None or group.world == 1:
        return magnitudes(session)
    made = shared(group, lambda: {name: backend.to_raw(array) for name, array in magnitudes(session).items()})
    return {name: backend.from_raw(raw) for name, raw in made.items()}


def trained_on(config: FinetuneConfig, files: ModelFiles) -> dict[str, str]:
    """What `hf/trained.py` reads: empty where the base was as it is stored."""
    if config.storage is None or files.affine:
        return {}
    said = {"storage": config.storage, "dtype": config.dtype or files.dtype}
    return said if config.lora.init == "random" else {**said, "start": "pissa"}


def read_start(out: Path) -> Mapping[str, RawTensor]:
    return open_file(_file(out))


def keep_start(out: Path, start: Mapping[str, RawTensor]) -> None:
    if start:
        save_file(_file(out), start)


def _file(out: Path) -> Path:
    return out / "smedjan" / "start.safetensors"

"""What an adapter was trained beside, where that is not its base as it is stored: weights of 4 or 8 bits, over which it
has learnt to make up for what they lost. Merged into the weights as they are stored, it makes up for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from smedjan.backends.base import Backend
from smedjan.checkpoint import stored
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, specs_of
from smedjan.checkpoint.safetensors import read_metadata
from smedjan.errors import ConfigError
from smedjan.hf import pissa
from smedjan.hf.load import ModelFiles, arrays_of, open_session
from smedjan.hf.mlx_lm_adapter import is_mlx_lm
from smedjan.hf.peft import OURS, WEIGHTS, read_adapter
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Session


def told(directory: Path) -> dict[str, str]:
    """What a run of ours wrote into its adapter's file: `storage` and `dtype` of the weights, `start`."""
    if is_mlx_lm(directory):
        return {}
    metadata = read_metadata(directory / WEIGHTS)
    return {key.removeprefix(OURS): value for key, value in metadata.items() if key.startswith(OURS)}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An adapter as it was trained, and the model under it: `files` are the weights that were then quantised."""

    files: ModelFiles
    lora: Lora
    tensors: Mapping[str, RawTensor]
    storage: str
    dtype: str

    def session(self, backend: Backend) -> Session:
        session = open_session(self.files, backend, dtype=self.dtype, quantized=self.storage)
        adapters = {name: tensor for name, tensor in self.tensors.items() if ".lora_" in name}
        session.use(self.lora, arrays_of(backend, adapters))
        return session

    def widened(self) -> LazyTensors:
        """Every weight, those that were quantised as what is left of them."""
        narrow, base = self.files.config.linear_weights(), self.files.tensors

        def load(name: str) -> Callable[[], RawTensor]:
            def made() -> RawTensor:
                weight = convert(base[name], self.dtype)
                if name not in narrow:
                    return weight
                parts = stored.quantize(self.storage, weight)
                return stored.dequantize(self.storage, parts, weight.shape, self.dtype)

            return made

        return LazyTensors(
            {
                name: LazyTensor(spec=replace(spec, dtype=self.dtype), file=self.files.path, load=load(name))
                for name, spec in specs_of(base).items()
            }
        )


def trained(files: ModelFiles, directory: Path, storage: str | None = None) -> Trained | None:
    """None where the adapter was trained beside the weights as they are stored. `storage` is for adapters that do not
    say."""
    said = told(directory)
    storage = storage or said.get("storage")
    if storage is None:
        return None
    if storage not in stored.FORMATS:
        raise ConfigError(
            f"{storage!r} is no format of weights",
            file=directory / WEIGHTS,
            field="storage",
            remedy=f"give {' or '.join(stored.FORMATS)}",
        )
    lora, tensors = read_adapter(directory, files.tensors)
    if said.get("start") == "pissa":
        lora, tensors, start = pissa.parted(lora, tensors)
        files = replace(files, tensors=pissa.residual(lora, files.tensors, start))
    return Trained(files=files, lora=lora, tensors=tensors, storage=storage, dtype=said.get("dtype") or files.dtype)

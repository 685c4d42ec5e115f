"""A model directory as a live Session: config read strictly, every tensor checked, weights converted where asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from smedjan.backends.base import Array, Backend
from smedjan.checkpoint import int8 as eight
from smedjan.checkpoint import stored
from smedjan.checkpoint.affine import BIASES, SCALES, WEIGHT, AffineTensor, affine_of
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor, specs_of
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf.hub import is_hub_id
from smedjan.hf.import_model import match_tensors, read_source
from smedjan.hf.peft import CONFIG as ADAPTER_CONFIG
from smedjan.hf.peft import base_of, read_adapter, tensors_of
from smedjan.hf.whole_modules import laid_over, replaced, saved_names
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import read_config
from smedjan.ops.quantized import Affine
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Session

COMPUTED = ("float32", "bfloat16")

MERGE_FIRST = "merge it into a model first: smedjan merge"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What a directory holds: `data` is its config.json as read, `tensors` are mapped, in HF's parameter order.

    `tokenizer_path` is where its tokenizer is: an adapter with more tokens than its base brings one.
    """

    path: Path
    data: dict[str, Any]
    config: DecoderConfig
    tensors: Mapping[str, RawTensor]
    dtype: str
    own_tokenizer: Path | None = None

    @property
    def affine(self) -> dict[str, Affine]:
        """The weights that are stored in MLX's format, and how."""
        return {n: Affine(bits=t.bits, group_size=t.group_size) for n, t in affine_of(self.tensors).items()}

    @property
    def tokenizer_path(self) -> Path:
        return self.own_tokenizer or self.path


def open_model(path: str | Path, adapter: Path | None = None) -> ModelFiles:
    """Reads and checks a model directory (or hub id, or .gguf file) without loading its weights. Embeddings and heads
    that `adapter` holds whole are laid over its own."""
    read = read_source(path, ())
    config = read_config(read.config, read.file)
    tensors, _ignored = match_tensors(read, config)
    dtypes = {spec.dtype for spec in specs_of(tensors).values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    folder = read.files_from or read.file.parent
    files = ModelFiles(path=folder, data=read.config, config=config, tensors=tensors, dtype=dtype)
    return files if adapter is None else with_adapter(files, adapter)


def with_adapter(files: ModelFiles, adapter: Path) -> ModelFiles:
    """The model under the whole modules of an adapter; the same model where it has none."""
    if not saved_names(adapter)[0]:
        return files
    held = tensors_of(adapter)
    data, made = laid_over(files.data, files.config, files.tensors, adapter, held)
    own = adapter if (adapter / "tokenizer.json").is_file() else files.own_tokenizer
    return replace(changed(files, data, made), own_tokenizer=own)


def changed(files: ModelFiles, data: dict[str, Any], tensors: Mapping[str, RawTensor]) -> ModelFiles:
    """The model of another config.json, with some tensors in the place of, or beside, its own."""
    config = read_config(data, files.path / "config.json")
    everything = replaced(files.tensors, tensors, files.path)
    for name, shape in config.parameter_shapes().items():
        if everything.entries[name].spec.shape != shape:
            raise CheckpointError(
                f"has shape {list(everything.entries[name].spec.shape)}, not {list(shape)}",
                field=name,
                remedy="give the model that this adapter was trained on",
            )
    return replace(files, data=data, config=config, tensors=everything)


def resolve(path: str | Path, adapter: str | Path | None) -> tuple[str | Path, Path | None]:
    """(base model, adapter): a directory that holds an adapter alone is loaded with the base that it names."""
    where = Path(path)
    if adapter is not None or not (where / ADAPTER_CONFIG).is_file() or (where / "config.json").is_file():
        return path, None if adapter is None else Path(adapter)
    base, key = base_of(where)
    if not Path(base).exists() and not is_hub_id(base):
        # A path relative to where it was trained, as PEFT has it
        raise ConfigError(
            f"names the base {base!r}, which is not in the working directory",
            file=where / ADAPTER_CONFIG,
            field=key,
            remedy=f"give the path of the base model and --adapter {where}",
        )
    return base, where


def computed_dtype(files: ModelFiles, dtype: str | None) -> str:
    """The dtype asked for, or, where none is, that of the weights as stored."""
    chosen = dtype or files.dtype
    if chosen not in COMPUTED:
        raise ConfigError(
            f"{chosen} is not computed in",
            file=files.path,
            field="dtype",
            remedy=f"give --dtype {' or '.join(COMPUTED)}",
        )
    return chosen


def open_session(
    files: ModelFiles,
    backend: Backend,
    *,
    dtype: str | None = None,
    attention: str = "sdpa",
    adapter: Path | None = None,
    quantized: str | None = None,
    int8: bool = False,
) -> Session:
    """Weights on the backend. `adapter` is a directory in PEFT's or mlx-lm's layout, laid beside the frozen weights.

    With `quantized`, the linear weights of the blocks become nf4 or int8, from their values in `dtype`, one at a time.
    With `int8`, they and the head become 8-bit codes for inference, from their values as stored.
    """
    chosen = computed_dtype(files, dtype)
    if adapter is not None:
        files = with_adapter(files, adapter)
    narrow = files.config.linear_weights() if quantized else ()
    codes = files.config.eight_bit_weights() if int8 else ()
    if int8 and adapter is not None:
        raise ConfigError("goes with no adapter", field="quantize", remedy=MERGE_FIRST)
    held = affine_of(files.tensors)
    if held and (quantized or int8):
        raise ConfigError(
            "the weights are in few bits already",
            file=files.path,
            field="quantize" if int8 else "lora.bits",
            remedy="leave it out, or write them out first: smedjan import",
        )
    parameters = {}
    squares = missed = 0.0
    for name in files.tensors:
        if name in held:
            parameters.update(_affine_arrays(backend, name, held[name], chosen))
            continue
        tensor = files.tensors[name]
        if name in codes:
            parts, size, off = eight.quantize(tensor)
            squares, missed = squares + size, missed + off
            parameters.update({f"{name}.{suffix}": backend.from_raw(raw) for suffix, raw in parts.items()})
            continue
        made = {name: convert(tensor, chosen)}
        if name in narrow:
            assert quantized is not None
            made = {f"{name}.{suffix}": part for suffix, part in stored.quantize(quantized, made[name]).items()}
        parameters.update({key: backend.from_raw(raw) for key, raw in made.items()})
        tensor.drop_pages()  # the backend has its own copy
    session = Session(
        backend,
        files.config,
        parameters,
        chosen,
        attention=attention,
        quantized=narrow,
        storage=quantized or "nf4",
        int8=codes,
        affine=files.affine,
    )
    session.quantization_error = sqrt(missed / squares) if squares else 0.0
    if adapter is not None:
        session.use(*open_adapter(files, backend, adapter))
    return session


def _affine_arrays(backend: Backend, name: str, tensor: AffineTensor, dtype: str) -> dict[str, Array]:
    """NAME.affine, NAME.scales and NAME.biases, the latter two in `dtype`."""
    made = {}
    for part, suffix in ((WEIGHT, "affine"), (SCALES, SCALES), (BIASES, BIASES)):
        raw = tensor.stored[part].load()
        made[f"{name}.{suffix}"] = backend.from_raw(raw if part == WEIGHT else convert(raw, dtype))
        raw.drop_pages()
    return made


def checked_adapter(files: ModelFiles, directory: Path) -> tuple[Lora, dict[str, RawTensor]]:
    """An adapter of this model: every tensor checked."""
    lora, tensors = read_adapter(directory, files.tensors)
    expected = lora.shapes({name: spec.shape for name, spec in specs_of(files.tensors).items()})
    for name, shape in expected.items():
        if name not in tensors or tensors[name].shape != shape:
            raise CheckpointError(
                "is missing" if name not in tensors else f"has shape {list(tensors[name].shape)}, not {list(shape)}",
                file=directory,
                field=name,
                remedy="give the model that this adapter was trained on",
            )
    return lora, {name: tensors[name] for name in expected}


def open_adapter(files: ModelFiles, backend: Backend, directory: Path) -> tuple[Lora, dict[str, Array]]:
    """The same on the backend."""
    lora, tensors = checked_adapter(files, directory)
    return lora, arrays_of(backend, tensors)


def arrays_of(backend: Backend, tensors: Mapping[str, RawTensor]) -> dict[str, Array]:
    return {name: backend.from_raw(convert(tensor, "float32")) for name, tensor in tensors.items()}

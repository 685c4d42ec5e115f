"""Weights that are missing, cut, of another shape or dtype or not finite, and shards that disagree with their index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import CASES
from tests.hf.damage import (
    INDEX,
    WEIGHTS,
    Damage,
    check,
    edit_header,
    header_of,
    make_source,
    put,
    put_json,
    with_header,
)


def _edit_tensor(
    name: str, change: Callable[[np.ndarray], np.ndarray], code: str | None = None
) -> Callable[[Path], None]:
    """The float32 tensor `name` changed; what follows it in the file moves."""

    def apply(directory: Path) -> None:
        file = directory / WEIGHTS
        header, data = header_of(file)
        tensors = {
            key: (info, data[info["data_offsets"][0] : info["data_offsets"][1]])
            for key, info in header.items()
            if key != "__metadata__"
        }
        info, content = tensors[name]
        changed = change(np.frombuffer(content, np.float32).reshape(info["shape"]))
        tensors[name] = ({"dtype": code or info["dtype"], "shape": list(changed.shape)}, changed.tobytes())
        written, reached = {}, 0
        for key, (entry, part) in tensors.items():
            written[key] = {**entry, "data_offsets": [reached, reached + len(part)]}
            reached += len(part)
        put(file, with_header(written, b"".join(part for _, part in tensors.values())))

    return apply


def _poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        made = values.copy()
        made.flat[made.size // 2] = value
        return made

    return change


def tensor_damages(source: Path, label: str) -> list[Damage]:
    """Each tensor missing, transposed, cut, renamed, poisoned or of another dtype.

    A square matrix transposed is another sound model, as are two tensors of one shape exchanged: no check sees that.
    """
    header, data = header_of(source / WEIGHTS)
    made: list[Damage] = []

    def add(name: str, what: str, apply: Callable[[Path], None], *names: str, file: str = WEIGHTS) -> None:
        made.append(
            Damage(what=f"{label}: {name} {what}", file=file, names=names or (name,), apply=apply, refused=True)
        )

    for position, (name, info) in enumerate((key, header[key]) for key in header if key != "__metadata__"):
        shape, (begin, end) = info["shape"], info["data_offsets"]
        add(name, "missing", _without(name), file="")
        add(name, "renamed", _renamed(name, name.replace("weight", "wieght").replace("bias", "bais")), file="")
        add(name, "one row less", _edit_tensor(name, lambda values: values[:-1]))
        if len(shape) == 2 and shape[0] != shape[1]:
            add(name, "transposed", _edit_tensor(name, lambda values: values.T.copy()))
        add(name, "with a dim more", _edit_tensor(name, lambda values: values[None]))
        add(name, "the file cut within", _cut((begin + end) // 2 - len(data)))
        bad = (float("nan"), float("inf"), float("-inf"))[position % 3]
        add(name, f"with {bad}", _edit_tensor(name, _poisoned(bad)))
        kind, code = ((np.int8, "I8"), (np.uint8, "U8"), (np.uint8, "F8_E4M3"), (np.int32, "I32"))[position % 4]
        add(name, f"as {code}", _edit_tensor(name, lambda values, kind=kind: values.astype(kind), code))
        add(
            name, "as F16, alone", _edit_tensor(name, lambda values: values.astype(np.float16), "F16"), "dtype", file=""
        )
    return made


def _without(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / WEIGHTS
        header, data = header_of(file)
        begin, end = header.pop(name)["data_offsets"]
        for info in header.values():
            if "data_offsets" in info and info["data_offsets"][0] >= end:
                info["data_offsets"] = [at - (end - begin) for at in info["data_offsets"]]
        put(file, with_header(header, data[:begin] + data[end:]))

    return apply


def _renamed(name: str, new: str) -> Callable[[Path], None]:
    return edit_header(lambda header: header.update({new: header.pop(name)}))


def _cut(end: int) -> Callable[[Path], None]:
    """Without the last -end bytes."""
    return lambda directory: put(directory / WEIGHTS, (directory / WEIGHTS).read_bytes()[:end])


MODELS = {
    "llama": CASES["llama"]["rope-llama3"],
    "gemma3_text": CASES["gemma3_text"]["scaled-global"],
    "gpt2": CASES["gpt2"]["plain"],
    "gpt_neox": CASES["gpt_neox"]["parallel"],
    "phi3": CASES["phi3"]["longrope"],
    "stablelm": CASES["stablelm"]["head-norms"] | {"num_hidden_layers": 2},
}
"""[out, in] and [in, out], fused and not, tied and not, a norm a head, a head under another name."""


@pytest.mark.parametrize("family", MODELS)
def test_each_tensor(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family, MODELS[family])
    damages = tensor_damages(source, family)
    assert len(damages) > 200
    check(source, damages, tmp_path / "scratch")


def test_a_tensor_under_an_older_name_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    """GPT-2 as the hub has it, without `transformer.`, and with its masks."""
    source = make_source(tmp_path / "source", "gpt2", MODELS["gpt2"])
    header, data = header_of(source / WEIGHTS)
    old = {name.removeprefix("transformer."): info for name, info in header.items()}
    put(source / WEIGHTS, with_header(old, data))
    damages = [each for each in tensor_damages(source, "gpt2") if not each.what.endswith(("missing", "renamed"))]
    check(source, damages, tmp_path / "scratch")


Index = dict[str, Any]


def _moved(index: Index, name: str, shard: Any) -> None:
    index["weight_map"][name] = shard


INDICES: dict[str, tuple[Callable[[Index], object], str]] = {
    "no weight_map": (lambda index: index.pop("weight_map"), "weight_map"),
    "an empty weight_map": (lambda index: index.update(weight_map={}), "weight_map"),
    "a weight_map that is a list": (lambda index: index.update(weight_map=[]), "weight_map"),
    "a shard that is a number": (lambda index: _moved(index, "model.norm.weight", 7), "weight_map"),
    "a shard that is null": (lambda index: _moved(index, "model.norm.weight", None), "weight_map"),
    "a shard above": (lambda index: _moved(index, "model.norm.weight", "../x.safetensors"), "weight_map"),
    "a shard elsewhere": (lambda index: _moved(index, "model.norm.weight", "/etc/passwd"), "weight_map"),
    "a shard with a zero byte": (lambda index: _moved(index, "model.norm.weight", "a\0b"), "weight_map"),
    "a shard with a name too long": (lambda index: _moved(index, "model.norm.weight", "a" * 5000), "weight_map"),
    "a shard that is missing": (
        lambda index: _moved(index, "model.norm.weight", "none.safetensors"),
        "model.norm.weight",
    ),
    "a shard that is no weights": (lambda index: _moved(index, "model.norm.weight", "config.json"), "header"),
    "another shard": (
        lambda index: _moved(index, "model.embed_tokens.weight", _last(index)),
        "model.embed_tokens.weight",
    ),
    "a tensor left out": (lambda index: index["weight_map"].pop("model.norm.weight"), "model.norm.weight"),
    "a tensor that is nowhere": (lambda index: _moved(index, "model.other.weight", _last(index)), "model.other.weight"),
}


def _last(index: Index) -> str:
    return max(index["weight_map"].values())


def _edit_index(change: Callable[[Index], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        put_json(directory / INDEX, index)

    return apply


def test_shards_and_indices_that_disagree(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama", MODELS["llama"], max_shard_size="60KB")
    shards = sorted(path.name for path in source.glob("model-*"))
    assert len(shards) > 3
    damages = [
        Damage(what=what, file="", names=(name,) if name else (), apply=_edit_index(change), refused=True)
        for what, (change, name) in INDICES.items()
    ]
    texts = {
        "empty": b"",
        "cut": b'{"weight_map": {"a"',
        "a list": b"[]",
        "zeros": bytes(100),
        "no UTF-8": b'{"\xff": 1}',
    }
    damages += [
        Damage(
            what=f"the index is {what}",
            file=INDEX,
            names=(),
            apply=lambda directory, text=text: put(directory / INDEX, text),
            refused=True,
        )
        for what, text in texts.items()
    ]
    for shard, other in zip(shards, [*shards[1:], shards[0]], strict=True):
        whole = (source / shard).read_bytes()
        contents = {
            "is empty": b"",
            "is cut": whole[: len(whole) // 2],
            "is another": (source / other).read_bytes(),
            "is its own pointer": b"version https://git-lfs.github.com/spec/v1",
        }
        damages += [
            Damage(
                what=f"{shard} {what}",
                file=shard,
                names=(),
                apply=lambda directory, shard=shard, content=content: put(directory / shard, content),
                refused=True,
            )
            for what, content in contents.items()
        ]
        damages.append(
            Damage(
                what=f"{shard} is gone",
                file=shard,
                names=(),
                apply=lambda directory, shard=shard: (directory / shard).unlink(),
                refused=True,
            )
        )
    damages.append(
        Damage(
            what="no index", file=INDEX, names=(), apply=lambda directory: (directory / INDEX).unlink(), refused=True
        )
    )
    damages.append(
        Damage(
            what="one file and shards",
            file="",
            names=(),
            apply=lambda directory: put(directory / WEIGHTS, (directory / shards[0]).read_bytes()),
            refused=True,
        )
    )
    check(source, damages, tmp_path / "scratch")

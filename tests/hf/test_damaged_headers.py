"""safetensors headers that lie: what they say of a tensor, and what they are as a whole."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families import CASES
from tests.hf.damage import WEIGHTS, Damage, check, edit_header, header_of, make_source, put

BIG = 2**63
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a dtype that is none": lambda info: info.update(dtype="F33"),
    "a dtype that is no text": lambda info: info.update(dtype=7),
    "a wider dtype": lambda info: info.update(dtype="F64"),
    "a narrower dtype": lambda info: info.update(dtype="BF16"),
    "a negative dim": lambda info: info.update(shape=[-each for each in info["shape"]]),
    "two negative dims": lambda info: info.update(shape=[-1, -math.prod(info["shape"])]),
    "a dim that is no integer": lambda info: info.update(shape=[float(each) for each in info["shape"]]),
    "a dim that is true": lambda info: info.update(shape=[True, *info["shape"]]),
    "a shape that is no list": lambda info: info.update(shape=math.prod(info["shape"])),
    "a shape whose product is 0 in 64 bits": lambda info: info.update(shape=[2**32, 2**32]),
    "a shape whose product wraps around": lambda info: info.update(shape=[2**62 + 1, 4 * math.prod(info["shape"])]),
    "a shape whose product has too many digits to print": lambda info: info.update(shape=[2**62] * 400),
    "a dim of 4000 digits": lambda info: info.update(shape=[10**4000, 10**4000]),
    "no dims": lambda info: info.update(shape=[]),
    "a hundred thousand dims": lambda info: info.update(shape=[2] * 100_000),
    "offsets the other way round": lambda info: info.update(data_offsets=info["data_offsets"][::-1]),
    "one offset": lambda info: info.update(data_offsets=info["data_offsets"][:1]),
    "three offsets": lambda info: info.update(data_offsets=[*info["data_offsets"], 0]),
    "offsets that are text": lambda info: info.update(data_offsets=[str(at) for at in info["data_offsets"]]),
    "negative offsets": lambda info: info.update(data_offsets=[at - BIG for at in info["data_offsets"]]),
    "offsets past the end": lambda info: info.update(data_offsets=[at + BIG for at in info["data_offsets"]]),
    "offsets 4 bytes on": lambda info: info.update(data_offsets=[at + 4 for at in info["data_offsets"]]),
    "offsets 4 bytes back": lambda info: info.update(data_offsets=[at - 4 for at in info["data_offsets"]]),
    "no offsets": lambda info: info.pop("data_offsets"),
    "no shape": lambda info: info.pop("shape"),
    "no dtype": lambda info: info.pop("dtype"),
    "a key more": lambda info: info.update(strides=[1]),
    "the offsets of the tensor before it": lambda info: info.update(
        data_offsets=[at - math.prod(info["shape"]) * 4 for at in info["data_offsets"]]
    ),
}
"""What one entry of the header can say that is not so."""


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: put(directory / WEIGHTS, change((directory / WEIGHTS).read_bytes()))


def _length(value: int) -> Callable[[Path], None]:
    return _raw(lambda content: struct.pack("<Q", value) + content[8:])


def _text(text: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Another text as header, of its own length."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        made = text(content[8 : 8 + length])
        return struct.pack("<Q", len(made)) + made + content[8 + length :]

    return _raw(change)


HEADERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an empty file": (_raw(lambda content: b""), "header"),
    "seven bytes": (_raw(lambda content: content[:7]), "header"),
    "eight bytes": (_raw(lambda content: content[:8]), "header"),
    "cut in the header": (_raw(lambda content: content[:100]), "header"),
    "no data": (_raw(lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]]), ""),
    "bytes behind the data": (_raw(lambda content: content + b"0" * 16), "header"),
    "a header of no bytes": (_length(0), "header"),
    "a header of one byte": (_length(1), ""),
    "a huge header": (_length(2**63), "header"),
    "a negative header": (_length(2**64 - 1), "header"),
    "a header of 200 MB": (_length(200_000_000), "header"),
    "a header longer than the file": (_length(10_000_000), "header"),
    "a header cut in JSON": (_text(lambda text: text[: len(text) // 2]), ""),
    "a header that is a list": (_text(lambda text: b"[" + text + b"]"), "header"),
    "a header that is a number": (_text(lambda text: b"7"), "header"),
    "a header in UTF-16": (_text(lambda text: text.decode().encode("utf-16-le")), "header"),
    "a header of zeros": (_text(lambda text: bytes(len(text))), "header"),
    "a header that is no UTF-8": (_text(lambda text: text.replace(b"model", b"m\xffdel")), "header"),
    "half a surrogate as name": (_text(lambda text: text.replace(b'"model.norm', b'"\\ud800model.norm')), ""),
    "a name twice": (_text(lambda text: text.replace(b"up_proj", b"gate_proj")), "gate_proj"),
    "deep JSON": (_text(lambda text: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), ""),
    "an entry that is a list": (edit_header(lambda header: header.update({"model.norm.weight": []})), "model.norm"),
    "metadata that is a list": (edit_header(lambda header: header.update({"__metadata__": []})), "__metadata__"),
    "metadata that is nested": (
        edit_header(lambda header: header.update({"__metadata__": {"a": {}}})),
        "__metadata__",
    ),
    "a pickle": (_raw(lambda content: b"\x80\x02}q\x00." + content), "header"),
    "a page for git LFS": (
        _raw(lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "header",
    ),
}


def test_headers_that_lie(tmp_path: Path) -> None:
    """Every lie about four tensors, first, last and between, and about the header as a whole."""
    source = make_source(tmp_path / "source", "llama", CASES["llama"]["rope-llama3"])
    header, _ = header_of(source / WEIGHTS)
    ordered = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    damages = [
        Damage(
            what=f"{name}: {lie}",
            file=WEIGHTS,
            # A tensor that was moved may be sound, and its neighbour the one that is overlapped.
            names=tuple(ordered) if "offsets" in lie else (name,),
            apply=edit_header(lambda header, name=name, lie=lie: LIES[lie](header[name])),
            refused=True,
        )
        for name in (ordered[0], ordered[5], ordered[17], ordered[-1])
        for lie in LIES
    ]
    damages += [
        Damage(what=what, file=WEIGHTS, names=(name,) if name else (), apply=apply, refused=True)
        for what, (apply, name) in HEADERS.items()
    ]
    assert len(damages) > 120
    check(source, damages, tmp_path / "scratch")

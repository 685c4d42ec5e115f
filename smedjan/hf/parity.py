"""Parity: this model on a backend against `transformers`, case by case.

On the exact backend a case holds when every element is equal to the bit. On a fast one, when

    error(ours) <= 2 error(theirs) + 2 u,        error of a tensor: |value - ref| / |ref|, Euclidean norms

`ref` is transformers with the same weights in float64, `theirs` transformers in the case's own dtype, u its unit
roundoff: FlashAttention's criterion, in the norm that a whole model's error has. A tensor's largest element is a
single draw of what it inherits from all layers: a lucky one of theirs bounds nothing. So is the whole error of many a
gradient, which comes from a few roundings of massive activations: held one by one to what sdpa sets, gradients of
transformers' own eager attention break it in most texts. Tensors of a mode are held together instead, by the formula
for the root mean square of their errors and for the largest.

The loss is one number; it is held through its logits, of whose error it can inherit no more than twice the largest,
since the 1-norm of d loss / d logits of a row is 2 (1 - p). Its own float32 sum of n terms adds 2 n 2^-24 of itself.

The texts are longer than every sliding window and every length at which rotary positions change, up to `length`
tokens; one that begins just below such a length is decoded across it. What lies beyond `length` is listed as skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.backends.base import Backend
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.data.collate import IGNORE, Batch
from smedjan.errors import ConfigError
from smedjan.hf.bisect import bisect
from smedjan.hf.bisect_bound import ROUNDOFF, bisect_bound
from smedjan.hf.load import open_model, open_session
from smedjan.hf.peer import DECODE, Feed, Named, Peer, Refused, feeds
from smedjan.hf.watch import Parted, decoded, read_parameters, ulps
from smedjan.models.decoder_config import DecoderConfig
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session

BATCH, SEQ, MARGIN = 2, 12, 4
LENGTH = 128
"""Tokens of the longest text by default: what a model of a billion parameters does in seconds."""
PADDINGS = ("none", "left", "right")
ATTENTIONS = ("sdpa", "eager")
Made = dict[str, Named]
"""By mode (logits, gradients, decode), then by name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. `equal`: every bit. max_abs, max_ulp: the largest distance from transformers in the same dtype,
    which `tensor` has.

    `error` is held to `bound`, of what comes nearest to it: the tensors' root mean square or largest relative error, or
    the loss. Both are 0 on the exact backend, where only `equal` counts. `seq` is the text's length in tokens. `parted`
    is where a case that fails leaves transformers, as far as that can be told.
    """

    name: str
    attention: str
    dtype: str
    mode: str
    batch: int
    seq: int
    padding: str
    equal: bool
    max_abs: float
    max_ulp: int
    tensor: str
    error: float
    bound: float
    parted: Parted | None = None

    @property
    def holds(self) -> bool:
        return self.equal or (self.bound > 0 and self.error <= self.bound)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Every case, and what was not compared: what transformers itself refuses, and what is longer than the texts.

    `layers` is how many the model has, for a picture of where a case parts.
    """

    model_type: str
    layers: int
    cases: tuple[Case, ...]
    skipped: tuple[dict[str, str], ...]
    backend: str
    exact: bool
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        return bool(self.cases) and all(case.holds for case in self.cases)


def parity(
    path: str | Path,
    *,
    attention: Sequence[str] = ATTENTIONS,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    backend: str = "torch_reference",
    seed: int = 0,
    length: int = LENGTH,
    on_case: Callable[[Case], None] | None = None,
) -> ParityReport:
    """Logits, cached decode and every gradient of the model in `path`, for each attention, dtype and padding."""
    for name in attention:
        if name not in ATTENTIONS:
            raise ConfigError(f"is {name!r}", field="attention", remedy=f"give {' or '.join(ATTENTIONS)}")
    files, chosen = open_model(path), select_backend(backend)
    cases: list[Case] = []
    skipped = _too_long(files.config, length)
    for dtype in dtypes:
        session = open_session(files, chosen, dtype=dtype)
        peer = Peer.open(files, dtype)
        truth = None if chosen.exact else peer.widened()
        for name in attention:
            try:
                for side in (peer, truth):
                    if side is not None:
                        side.use(name)
            except Refused as refusal:
                skipped.append({"name": f"{name} {dtype}", "reason": str(refusal)})
                continue
            for case in compare(replace(session, attention=name), peer, truth=truth, seed=seed, length=length):
                cases.append(case)
                if on_case is not None:
                    on_case(case)
    return ParityReport(
        model_type=files.config.model_type,
        layers=files.config.num_hidden_layers,
        cases=tuple(cases),
        skipped=tuple(skipped),
        backend=chosen.name,
        exact=chosen.exact,
        versions=_versions(chosen),
    )


def compare(
    session: Session,
    peer: Peer,
    *,
    truth: Peer | None = None,
    paddings: Sequence[str] = PADDINGS,
    seed: int = 0,
    length: int = LENGTH,
    explain: bool = True,
) -> Iterator[Case]:
    """The cases of a live session and a live peer, which have one attention and one dtype. `truth` is the peer widened,
    which a fast backend needs. With `explain`, a case that fails is bisected."""
    assert session.backend.exact or truth is not None, "a fast backend is held to a bound: give the widened peer"
    assert peer.attention == session.attention, (peer.attention, session.attention)
    prefills = _prefills(session.config, length)
    for padding in paddings:
        batch = _rows(session.config, padding, seed, prefills[0])
        script = list(feeds(batch, prefills))
        ours, theirs = _ours(session, batch, script), peer.run(batch, prefills)
        reference = None if truth is None else _real(truth.run(batch, prefills), batch, script)
        if reference is not None:
            ours, theirs = _real(ours, batch, script), _real(theirs, batch, script)
        for mode in ("logits", "gradients", "decode"):
            held = [] if reference is None else _held(mode, ours, theirs, reference, batch, session.dtype)
            case = _case(mode, ours[mode], theirs[mode], held, session, padding, batch)
            if explain and not case.holds:
                find = bisect if truth is None else bisect_bound
                parted = find(session, peer, batch, mode, prefills=prefills)
                if parted is None and truth is None and mode != "gradients":
                    parted = _cut_short(session, case)
                case = replace(case, parted=parted)
            yield case


def _cut_short(session: Session, case: Case) -> Parted:
    """Every value of ours is one of transformers', and the last is not its last: it computes a step more."""
    head = session.config.names.head
    return Parted(
        layer=None,
        behind=True,
        op="output",
        primitive="output",
        module=head,
        backward=False,
        ulp=case.max_ulp,
        peer=f"a step that follows {head}",
    )


def _versions(backend: Backend) -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, **backend.versions()}


def turns(config: DecoderConfig) -> list[int]:
    """The numbers of tokens beyond which the model computes otherwise: windows, and lengths where rope changes."""
    found: set[int] = set()
    for layer in config.layers:
        if layer.window is not None and layer.window < config.max_position_embeddings:
            found.add(layer.window)
        if layer.rope is not None and layer.rope.rope_type == "longrope":
            found.add(layer.rope.original_max_position_embeddings or 0)
        if layer.rope is not None and layer.rope.rope_type == "dynamic":
            found.add(layer.rope.max_position_embeddings or 0)
    return sorted(found - {0})


def _prefills(config: DecoderConfig, length: int) -> tuple[int, ...]:
    """Tokens of the texts to decode from: past every turn that `length` has room for, then just short of each."""
    near = [turn for turn in turns(config) if turn + MARGIN <= length]
    room = config.max_position_embeddings
    if any(layer.rope is not None and layer.rope.rope_type == "dynamic" for layer in config.layers):
        room = max(room, length)  # its positions go on past that
    seq = max(1, min(max([SEQ, *(turn + MARGIN for turn in near)]), room - DECODE))
    return (seq, *(turn - 1 for turn in near if seq // 3 < turn - 1 < seq))


def _too_long(config: DecoderConfig, length: int) -> list[dict[str, str]]:
    return [
        {"name": f"past {turn} tokens", "reason": f"the texts have {length} tokens; give --length {turn + MARGIN}"}
        for turn in turns(config)
        if turn + MARGIN > length
    ]


def _held(mode: str, ours: Made, theirs: Made, reference: Made, batch: Batch, dtype: str) -> list[tuple[float, float]]:
    """(error, bound): the tensors' root mean square, the largest of them, the loss. What is not finite is infinitely
    far."""
    held, pairs = [], []
    for name, ref in reference[mode].items():
        found = _relative(_named(ours[mode], name, ref), ref)
        if name == "loss":
            spread = float(np.abs(ours["logits"]["logits"] - reference["logits"]["logits"]).max())
            held.append((found, 2 * spread / abs(float(ref)) + 2 * batch.trained_tokens * ROUNDOFF["float32"]))
        else:
            pairs.append((found, _relative(theirs[mode][name], ref)))
    of = np.array(pairs)
    for mine, plain in (np.sqrt((of**2).mean(axis=0)), of.max(axis=0)):
        held.append((float(mine), 2 * float(plain) + 2 * ROUNDOFF[dtype]))
    return held


def _named(made: Named, name: str, like: np.ndarray) -> np.ndarray:
    """A gradient that is not there is that of a parameter on which nothing depends."""
    return made[name] if name in made else np.zeros(like.shape, dtype=np.float32)


def _case(
    mode: str,
    ours: Named,
    theirs: Named,
    held: list[tuple[float, float]],
    session: Session,
    padding: str,
    batch: Batch,
) -> Case:
    equal, max_abs, furthest = True, 0.0, (0, "")
    for name, their in theirs.items():
        our = _named(ours, name, their)
        if our.shape != their.shape:
            equal, max_abs, furthest = False, float("inf"), (1 << 32, name)
            continue
        if np.array_equal(our.view(np.int32), their.view(np.int32)):
            continue
        equal = False
        furthest = max(furthest, (ulps(our, their, session.dtype), name), key=lambda pair: pair[0])
        max_abs = max(max_abs, float(np.abs(our.astype(np.float64) - their).max(initial=0.0)))
    error, bound = max(held, key=lambda pair: pair[0] / pair[1], default=(0.0, 0.0))
    return Case(
        name=f"{session.attention} {session.dtype} {mode} padding={padding}",
        attention=session.attention,
        dtype=session.dtype,
        mode=mode,
        batch=BATCH,
        seq=batch.input_ids.shape[1],
        padding=padding,
        equal=equal,
        max_abs=max_abs,
        max_ulp=furthest[0],
        tensor=furthest[1],
        error=error,
        bound=bound,
    )


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    off = float(np.linalg.norm(value - reference) / max(np.linalg.norm(reference), np.finfo(np.float64).tiny))
    return off if np.isfinite(off) else float("inf")


def _rows(config: DecoderConfig, padding: str, seed: int, seq: int) -> Batch:
    """Random tokens, the first quarter not trained; the first row padded on the given side."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, PADDINGS.index(padding)])))
    ids = generator.integers(0, config.vocab_size, size=(BATCH, seq), dtype=np.int64)
    mask = np.ones((BATCH, seq), dtype=np.int64)
    if padding == "left":
        mask[0, : seq // 3] = 0
    if padding == "right":
        mask[0, -(seq // 3) :] = 0
    labels = np.full_like(ids, IGNORE)
    labels[:, :-1] = np.where(mask[:, 1:] * mask[:, :-1] > 0, ids[:, 1:], IGNORE)
    labels[:, : seq // 4] = IGNORE
    rows = np.flatnonzero(labels != IGNORE)
    return Batch(
        input_ids=ids,
        position_ids=np.broadcast_to(np.arange(seq, dtype=np.int64), ids.shape),
        labels=labels,
        attention_mask=None if padding == "none" else mask,
        segment_ids=None,
        loss_rows=rows,
        trained_tokens=len(rows),
        tokens=int(mask.sum()),
        kind="causal" if padding == "none" else "padded",
    )


def _real(made: Made, batch: Batch, script: Sequence[Feed]) -> Made:
    """With logits of real tokens alone: what a padding position says is nobody's contract off the exact backend."""
    if batch.attention_mask is None:
        return made
    fed = {feed.name: feed.mask[:, -feed.ids.shape[1] :] > 0 for feed in script if feed.mask is not None}
    return {
        "logits": {"logits": made["logits"]["logits"][batch.attention_mask > 0]},
        "gradients": made["gradients"],
        "decode": {name: values[fed[name]] for name, values in made["decode"].items()},
    }


def _ours(session: Session, batch: Batch, script: Sequence[Feed]) -> Made:
    def host(array: Any) -> np.ndarray:
        raw: RawTensor = session.backend.to_raw(array)
        return to_float32(raw).reshape(raw.shape).copy()

    logits = host(session.logits(batch))
    loss, grads = session.micro(batch, read_parameters(session, batch), num_items=batch.trained_tokens)
    return {
        "logits": {"logits": logits},
        "gradients": {"loss": host(loss), **{name: host(array) for name, array in grads.items()}},
        "decode": {feed.name: host(made) for feed, made in decoded(session, script)},
    }

"""Parity: this model on a backend against `transformers`, case by case.

On the exact backend a case holds when every element is equal to the bit. On a fast one, when for every tensor

    |ours - ref| <= 2 |theirs - ref| + 2 u |ref|        (Euclidean norms)

`ref` is transformers with the same weights in float64, `theirs` transformers in the case's own dtype, u its unit
roundoff: FlashAttention's criterion, in the norm that a whole model's error has. (A tensor's largest element is a
single draw of what it inherits from all layers: a lucky one of theirs bounds nothing.) The loss is one number; it is
held through its logits, of whose error it can inherit no more than twice the largest, since the 1-norm of
d loss / d logits of a row is 2 (1 - p). Its own float32 sum of n terms adds 2 n 2^-24 of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.backends.base import Backend
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.data.collate import IGNORE, Batch
from smedjan.hf.load import ModelFiles, open_model, open_session
from smedjan.hf.peer import DECODE, Named, Peer, continuation
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Cache, Session

BATCH, SEQ = 2, 12
PADDINGS = ("none", "left", "right")
Made = dict[str, Named]
"""By mode (logits, gradients, decode), then by name."""
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. `equal`: every bit. max_abs, max_ulp: the largest distance from transformers in the same dtype.

    `error` is held to `bound`, of the tensor that comes nearest to it: |ours - ref| / |ref|, Euclidean norms, `ref` in
    float64. Both are 0 on the exact backend, where only `equal` counts.
    """

    name: str
    attention: str
    dtype: str
    mode: str
    batch: int
    padding: str
    equal: bool
    max_abs: float
    max_ulp: int
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.equal or (self.bound > 0 and self.error <= self.bound)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Every case, and what transformers itself refuses."""

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
    attention: Sequence[str] = ("sdpa", "eager"),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    backend: str = "torch_reference",
    seed: int = 0,
    on_case: Callable[[Case], None] | None = None,
) -> ParityReport:
    """Logits, cached decode and every gradient of the model in `path`, for each attention, dtype and padding."""
    files, chosen = open_model(path), select_backend(backend)
    cases: list[Case] = []
    for case in _cases(files, chosen, attention, dtypes, seed):
        cases.append(case)
        if on_case is not None:
            on_case(case)
    return ParityReport(
        cases=tuple(cases), skipped=(), backend=chosen.name, exact=chosen.exact, versions=_versions(chosen)
    )


def _versions(backend: Backend) -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, **backend.versions()}


def _cases(
    files: ModelFiles, backend: Backend, attention: Sequence[str], dtypes: Sequence[str], seed: int
) -> Iterator[Case]:
    for dtype in dtypes:
        for implementation in attention:
            session = open_session(files, backend, dtype=dtype, attention=implementation)
            peer = Peer(files, dtype, implementation)
            truth = None if backend.exact else Peer(files, dtype, implementation, wide=True)
            for padding in PADDINGS:
                batch = _rows(files, padding, seed)
                ours, theirs = _ours(session, batch), peer.run(batch)
                reference = None if truth is None else _real(truth.run(batch), batch)
                theirs = theirs if truth is None else _real(theirs, batch)
                for mode in ("logits", "gradients", "decode"):
                    held = [] if reference is None else _held(mode, ours, theirs, reference, batch, dtype)
                    yield _case(mode, ours[mode], theirs[mode], held, dtype, implementation, padding)


def _held(mode: str, ours: Made, theirs: Made, reference: Made, batch: Batch, dtype: str) -> list[tuple[float, float]]:
    """(error, bound) of every tensor of a mode, relative to the reference. What is not finite is infinitely far."""
    held = []
    for name, ref in reference[mode].items():
        if name == "loss":
            spread = float(np.abs(ours["logits"]["logits"] - reference["logits"]["logits"]).max())
            bound = 2 * spread / abs(float(ref)) + 2 * batch.trained_tokens * ROUNDOFF["float32"]
        else:
            bound = 2 * _relative(theirs[mode][name], ref) + 2 * ROUNDOFF[dtype]
        held.append((_relative(ours[mode][name], ref), bound))
    return held


def _case(
    mode: str,
    ours: Named,
    theirs: Named,
    held: list[tuple[float, float]],
    dtype: str,
    attention: str,
    padding: str,
) -> Case:
    equal, max_abs, max_ulp = True, 0.0, 0
    for name, their in theirs.items():
        our = ours[name]
        equal &= our.shape == their.shape and our.dtype == their.dtype and our.tobytes() == their.tobytes()
        max_ulp = max(max_ulp, _ulps(our, their, dtype))
        max_abs = max(max_abs, float(np.abs(our.astype(np.float64) - their).max(initial=0.0)))
    error, bound = max(held, key=lambda pair: pair[0] / pair[1], default=(0.0, 0.0))
    return Case(
        name=f"{attention} {dtype} {mode} padding={padding}",
        attention=attention,
        dtype=dtype,
        mode=mode,
        batch=BATCH,
        padding=padding,
        equal=equal,
        max_abs=max_abs,
        max_ulp=max_ulp,
        error=error,
        bound=bound,
    )


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    off = float(np.linalg.norm(value - reference) / max(np.linalg.norm(reference), np.finfo(np.float64).tiny))
    return off if np.isfinite(off) else float("inf")


def _ulps(a: np.ndarray, b: np.ndarray, dtype: str) -> int:
    """The most representable numbers of `dtype` between two elements; both arrays are float32 (bfloat16 widened)."""
    keys = []
    for array in (a, b):
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.int32).astype(np.int64)
        keys.append(np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) >> (16 if dtype == "bfloat16" else 0))
    return int(np.abs(keys[0] - keys[1]).max(initial=0))


def _rows(files: ModelFiles, padding: str, seed: int) -> Batch:
    """Random tokens, the first quarter not trained; the first row padded on the given side."""
    config = files.config
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, PADDINGS.index(padding)])))
    seq = min(SEQ, config.max_position_embeddings - DECODE)
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


def _real(made: dict[str, Named], batch: Batch) -> dict[str, Named]:
    """With logits of real tokens alone: what a padding position says is nobody's contract off the exact backend."""
    if batch.attention_mask is None:
        return made
    real = batch.attention_mask > 0
    prefill = {"prefill": made["decode"]["prefill"][real]}
    return {**made, "logits": {"logits": made["logits"]["logits"][real]}, "decode": {**made["decode"], **prefill}}


def _ours(session: Session, batch: Batch) -> dict[str, Named]:
    def host(array: Any) -> np.ndarray:
        raw: RawTensor = session.backend.to_raw(array)
        return to_float32(raw).reshape(raw.shape).copy()

    logits = host(session.logits(batch))
    loss, grads = session.micro(batch, list(session.parameters), num_items=batch.trained_tokens)
    cache = Cache(session, batch=BATCH, capacity=batch.input_ids.shape[1] + DECODE)
    mask = batch.attention_mask
    decoded = {"prefill": host(cache.feed(batch.input_ids, mask))}
    for step, tokens in enumerate(continuation(batch)):
        mask = None if mask is None else np.concatenate([mask, np.ones((BATCH, 1), dtype=np.int64)], axis=1)
        decoded[f"step {step}"] = host(cache.feed(tokens, mask))
    made = {
        "logits": {"logits": logits},
        "gradients": {"loss": host(loss), **{name: host(array) for name, array in grads.items()}},
        "decode": decoded,
    }
    return made if session.backend.exact else _real(made, batch)

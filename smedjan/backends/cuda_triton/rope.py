"""rope on Triton, alone or with the norms of queries and keys, and its tables: rules over `kernels/rope.py` and
`kernels/rope_tables.py`. Formulas there.

Heads [B, H, T, D] may be views of a [B, T, H D] projection; results that get a place of their own lie like one.
`upcast` and `weight_cast` name roundings that only an exact backend reproduces: everything is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import rope as kernels
from smedjan.backends.cuda_triton.kernels import rope_tables as table_kernels
from smedjan.backends.cuda_triton.norm import column_sums
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.torch_reference.rope import inverse_frequencies
from smedjan.graph.node import Node
from smedjan.ops.rope import RopeConfig

INSIDE = (0, 2, 1, 3)
"""[B, H, T, D] with the heads of a token side by side."""

Strides = tuple[int, int, int]


def _frequencies(rope: RopeConfig, head_dim: int, lengths: Sequence[int]) -> list[float]:
    """f_i of `rope` for so many tokens, one length after the other; float32's numbers."""
    return [value for tokens in lengths for value in inverse_frequencies(rope, head_dim, tokens).tolist()]


@RULES.kernel("rope_tables", label="triton rope_tables")
def rope_tables(
    run: Launches, ins: tuple, outs: tuple, *, rope: RopeConfig, head_dim: int, dtype: str, interleaved: bool
) -> None:
    """position_ids [B, T] -> cos, sin [B, 1, T, D]. Where the frequencies hang on how many tokens there are, the device
    decides: the host waits for no value, which a CUDA graph would not allow."""
    (positions,) = ins
    if positions.numel() == 0:
        return
    batch, tokens = positions.shape
    assert tokens == 1 or positions.stride(1) == 1, f"positions of strides {positions.stride()}"
    cos, sin = outs
    half = rope.rotary_dim(head_dim) // 2
    limits = {"longrope": rope.original_max_position_embeddings, "dynamic": rope.max_position_embeddings}
    limit = limits.get(rope.rope_type)
    lengths = [limit or 1]
    if rope.rope_type == "longrope":
        assert limit is not None
        lengths = [limit, limit + 1]
    length, tile = None, common.rope_tile(2 * half)
    if limit is not None:
        length, count = run.scratch((1,), torch.int64), common.flat_tile()
        run.kernel(
            table_kernels.position_count,
            (1,),
            positions,
            length,
            positions.stride(0),
            tokens,
            positions.numel(),
            COLS=count.cols,
            **count.options,
        )
    run.kernel(
        table_kernels.rope_tables,
        (common.cdiv(tokens, tile.rows), batch),
        positions,
        run.host(partial(_frequencies, rope, head_dim, lengths)),
        length,
        cos,
        sin,
        positions.stride(0),
        *_table_strides(cos, sin),
        tokens,
        limit or 0,
        rope.attention_scaling,
        HALF=half,
        FACTOR=float(rope.factor or 0.0) if rope.rope_type == "dynamic" else 0.0,
        INTERLEAVED=interleaved,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )


def _table_strides(*tables: Tensor | None) -> tuple[int, int]:
    """(batch, token) of cos and sin [B or 1, 1, T, D], which are made together; batch 0 where all sequences share."""
    given = [table for table in tables if table is not None]
    table = given[0]
    assert all(each.stride() == table.stride() and each.shape == table.shape for each in given), "cos and sin differ"
    assert table.stride(3) == 1
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(2)


def _head_strides(x: Tensor | None) -> Strides:
    """(batch, head, token) of [B, H, T, D]"""
    if x is None:
        return (0, 0, 0)
    assert x.stride(3) == 1, f"heads are not contiguous: {x.stride()}"
    return (x.stride(0), x.stride(1), x.stride(2))


@RULES.kernel("rope", label="triton rope", inplace=((0, 0),), order={0: INSIDE}, strided=True)
def rope(run: Launches, ins: tuple, outs: tuple, *, interleaved: bool, upcast: str) -> None:
    """x [B, H, T, head_dim], cos, sin [B or 1, 1, T, D] -> x * cos + rotate_half(x) * sin over a head's first D dims,
    the others as they are."""
    x, cos, sin = ins
    _rotate(run, (x, None), (None, None), (cos, sin), (outs[0], None), interleaved=interleaved)


@RULES.kernel("rope_bwd", label="triton rope", inplace=((0, 0),), order={0: INSIDE}, strided=True)
def rope_bwd(run: Launches, ins: tuple, outs: tuple, *, interleaved: bool, upcast: str) -> None:
    dy, cos, sin = ins
    _rotate(run, (dy, None), (None, None), (cos, sin), (outs[0], None), interleaved=interleaved, inverse=True)


@RULES.kernel(
    "qk_norm_rope",
    label="triton qk_norm_rope",
    inplace=((0, 0), (1, 1)),
    order={0: INSIDE, 1: INSIDE},
    strided=True,
)
def qk_norm_rope(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    eps: float,
    weight_cast: str,
    offset: float,
    interleaved: bool,
    upcast: str,
) -> None:
    """q [B, A, T, D], k [B, K, T, D], weights [D] or None, cos, sin -> q and k normed and turned, in one launch."""
    q, k, q_weight, k_weight, *tables = ins
    _rotate(run, (q, k), (q_weight, k_weight), tables, outs, interleaved=interleaved, eps=eps, offset=offset)


def _rotate(
    run: Launches,
    heads: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    tables: Sequence[Tensor],
    outs: Sequence[Tensor | None],
    *,
    interleaved: bool,
    inverse: bool = False,
    eps: float = 0.0,
    offset: float = 0.0,
) -> None:
    """`heads` and `outs`: of q and of k. A result that is None is not wanted, nor is its input read."""
    q, k = (None if out is None else x for x, out in zip(heads, outs, strict=True))
    plan = _plan(q, k, tables, interleaved=interleaved, norm=weights[0] is not None)
    if plan is None:
        return
    run.kernel(
        kernels.rope,
        (plan.row_tiles, plan.groups, plan.batch),
        q,
        k,
        *weights,
        *tables,
        *outs,
        *(stride for x in (q, k, *outs) for stride in _head_strides(x)),
        *plan.table_strides,
        plan.q_heads,
        plan.k_heads,
        plan.tokens,
        plan.group,
        plan.q_groups,
        eps,
        offset,
        INVERSE=inverse,
        **plan.constants,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one launch shares out the heads of q and of k, in groups of at most `group`: the first are q's."""

    batch: int
    tokens: int
    row_tiles: int
    q_heads: int
    k_heads: int
    group: int
    table_strides: tuple[int, int]
    constants: dict[str, Any]

    @property
    def q_groups(self) -> int:
        return common.cdiv(self.q_heads, self.group)

    @property
    def k_groups(self) -> int:
        return common.cdiv(self.k_heads, self.group)

    @property
    def groups(self) -> int:
        return self.q_groups + self.k_groups

    @property
    def tiles(self) -> int:
        """Of tokens, of all sequences."""
        return self.batch * self.row_tiles


def _plan(
    q: Tensor | None, k: Tensor | None, tables: Sequence[Tensor], *, interleaved: bool, norm: bool
) -> _Plan | None:
    """q or k may be None. None where there is nothing to do."""
    given = [x for x in (q, k) if x is not None]
    if not given or not any(x.numel() for x in given):
        return None
    batch, _, tokens, head_dim = given[0].shape
    dim = tables[0].shape[-1]
    assert all(x.shape[0] == batch and x.shape[2:] == given[0].shape[2:] for x in given)
    assert dim % 2 == 0, f"rope turns pairs, not {dim} dims"
    assert 0 < dim <= head_dim, f"rope of {dim} dims of {head_dim}"
    q_heads, k_heads = (0 if x is None else x.shape[1] for x in (q, k))
    tile = common.rope_tile(dim, head_dim - dim, norm=norm)
    row_tiles = common.cdiv(tokens, tile.rows)
    return _Plan(
        batch=batch,
        tokens=tokens,
        row_tiles=row_tiles,
        q_heads=q_heads,
        k_heads=k_heads,
        group=common.rope_heads(q_heads + k_heads, batch * row_tiles),
        table_strides=_table_strides(*tables),
        constants={
            "HALF": dim // 2,
            "REST": head_dim - dim,
            "INTERLEAVED": interleaved,
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "REST_COLS": common.next_power_of_2(head_dim - dim),
            **tile.options,
        },
    )


def _over(node: Node) -> tuple[tuple[int, int], ...]:
    """The gradients of q and k over their cotangents."""
    needs = node.attrs["needs"]
    return tuple((sum(needs[:place]), place) for place in (0, 1) if needs[place])


@RULES.kernel("qk_norm_rope_bwd", label="triton qk_norm_rope_bwd", inplace=_over, strided=True)
def qk_norm_rope_bwd(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    needs: tuple[bool, bool, bool, bool],
    eps: float,
    weight_cast: str,
    offset: float,
    interleaved: bool,
    upcast: str,
) -> None:
    """dq, dk, q, k, weights, cos, sin -> those of dq, dk, dq_weight, dk_weight that are needed: the rotation undone,
    then the norm's backward pass, whose rstd is computed again; then one launch for the sums of both weights."""
    dq, dk, q, k, q_weight, k_weight, cos, sin = ins
    found = iter(outs)
    dq_out, dk_out, *sums = (next(found) if need else None for need in needs)
    if q_weight is None:
        return _rotate(run, (dq, dk), (None, None), (cos, sin), (dq_out, dk_out), interleaved=interleaved, inverse=True)
    # A cotangent of which nothing is wanted is not read.
    dq, q = (dq, q) if dq_out is not None or sums[0] is not None else (None, None)
    dk, k = (dk, k) if dk_out is not None or sums[1] is not None else (None, None)
    plan = _plan(dq, dk, (cos, sin), interleaved=interleaved, norm=True)
    wanted = [out for out in sums if out is not None]
    if plan is None:
        for out in wanted:
            run.zero(out)
        return
    # Without sums no program needs to live longer than its tile.
    programs = min(plan.tiles, max(common.MAX_ROPE_PROGRAMS // plan.groups, 1)) if wanted else plan.tiles
    shared = zip((plan.q_groups, plan.k_groups), sums, strict=True)
    counts = [groups * programs for groups, out in shared if out is not None]
    whole = run.scratch((sum(counts), wanted[0].shape[0]), torch.float32) if wanted else None
    split = iter(() if whole is None else whole.split(counts))
    shares = [None if out is None else next(split) for out in sums]
    run.kernel(
        kernels.qk_norm_rope_bwd,
        (programs, plan.groups),
        dq,
        dk,
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        dq_out,
        dk_out,
        *shares,
        *(stride for x in (dq, dk, q, k, dq_out, dk_out) for stride in _head_strides(x)),
        *plan.table_strides,
        plan.q_heads,
        plan.k_heads,
        plan.tokens,
        plan.tiles,
        plan.group,
        plan.q_groups,
        eps,
        offset,
        **plan.constants,
    )
    if whole is not None:
        column_sums(run, whole, wanted, counts)

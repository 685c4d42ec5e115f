"""Rotary position embedding (Su et al. 2021, eq. 34): the tables of every scaling, and the rotation."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, cast, mul
from smedjan.ops.norm import rms_norm
from smedjan.ops.shape import concat, slice_last

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: angle(p, i) = p * f_i, f_i = rope_theta^(-2i / D), D = partial_rotary_factor * head_dim.

    rope_type scales the frequencies (transformers' modeling_rope_utils, whose names these are):
    - linear: f_i / factor.
    - dynamic (NTK): past max_position_embeddings = M, rope_theta (factor n / M - (factor - 1))^(D / (D - 2)) for n
      tokens.
    - llama3: f_i / factor for wavelengths 2 pi / f_i above original / low_freq_factor, f_i below original /
      high_freq_factor, interpolated between.
    - yarn (Peng et al. 2023, section 3.2): between f_i / factor and f_i by a ramp over i, whose ends turn beta_slow and
      beta_fast times within the original length.
    - longrope (Ding et al. 2024): f_i / long_factor_i for more tokens than the original length, f_i / short_factor_i
      for up to that many.

    cos and sin are multiplied by `attention_scaling`. Fields that the type does not use are None.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """The first dims of a head, which are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        assert self.factor is not None
        if self.rope_type == "longrope":
            assert self.original_max_position_embeddings is not None
            if self.factor <= 1.0:
                return 1.0
            return sqrt(1 + log(self.factor) / log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * log(scale) + 1.0


@op(cost=lambda node: 40 * node.outputs[0].numel)
def rope_tables(
    position_ids: Tensor, *, rope: RopeConfig, head_dim: int, dtype: str, interleaved: bool = False
) -> tuple[Spec, Spec]:
    """cos(p f), sin(p f) times rope.attention_scaling, D = rope.rotary_dim(head_dim) wide

    position_ids [B, T] -> cos, sin [B, 1, T, D]. Each frequency stands twice: f_i at i and D/2 + i, or at 2i and 2i + 1
    where `interleaved`. Angles and functions in float32, rounded to `dtype` once.
    """
    require(rope.rope_type in ROPE_TYPES, f"rope_tables: rope_type {rope.rope_type!r}")
    batch, seq = position_ids.shape
    spec = Spec((batch, 1, seq, rope.rotary_dim(head_dim)), dtype)
    return spec, spec


@op
def rotate_half(x: Tensor, *, interleaved: bool = False) -> Spec:
    """y = concat(-x2, x1) of the halves x1, x2 of the last dim; interleaved: y[2i] = -x[2i + 1], y[2i + 1] = x[2i]"""
    require(x.shape[-1] % 2 == 0, f"rotate_half: odd last dim in {x.shape}")
    return x.like()


@rotate_half.vjp
def _(dys, ins, outs, needs, acc, *, interleaved):
    return (rotate_half_bwd(dys[0], interleaved=interleaved),)


@op
def rotate_half_bwd(dy: Tensor, *, interleaved: bool = False) -> Spec:
    """dx = concat(dy2, -dy1); interleaved: dx[2i] = dy[2i + 1], dx[2i + 1] = -dy[2i]"""
    return dy.like()


@op(cost=lambda node: 3 * node.inputs[0].numel)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, upcast: str = "") -> Spec:
    """y = x * cos + rotate_half(x) * sin over the first D dims of a head, the others as they are

    x [B, H, T, head_dim], cos and sin [B or 1, 1, T, D] -> y [B, H, T, head_dim]. Runs in x's dtype; `upcast` in
    float32, rounded to x's dtype once: "input" widens x first (Cohere), "terms" each product (OLMo 2), which rounds the
    two parts of the gradient apart.
    """
    require(x.ndim == 4 and cos.shape == sin.shape, f"rope: x {x.shape}, cos {cos.shape}, sin {sin.shape}")
    require(cos.shape[-1] <= x.shape[-1] and cos.shape[2] == x.shape[2], f"rope: cos {cos.shape} for x {x.shape}")
    require(upcast in ("", "input", "terms"), f"rope: upcast {upcast!r}")
    require(upcast == "terms" or cos.dtype == x.dtype, f"rope: cos is {cos.dtype}, x is {x.dtype}")
    return x.like()


@rope.decompose
def _(x, cos, sin, *, interleaved, upcast):
    width, dim = x.shape[-1], cos.shape[-1]
    turned = x if dim == width else slice_last(x, start=0, stop=dim)
    if upcast == "terms":
        straight = mul(cast(turned, cos.dtype), cos)
        across = mul(cast(rotate_half(turned, interleaved=interleaved), sin.dtype), sin)
    else:
        wide = cast(turned, "float32") if upcast else turned
        straight = mul(wide, cast(cos, wide.dtype))
        across = mul(rotate_half(wide, interleaved=interleaved), cast(sin, wide.dtype))
    y = add(straight, across)
    y = cast(y, x.dtype)
    return y if dim == width else concat(y, slice_last(x, start=dim, stop=width), dim=-1)


@rope.vjp
def _(dys, ins, outs, needs, acc, **attrs):
    return (rope_bwd(dys[0], *ins[1:], **attrs), None, None)


@op(cost=lambda node: 3 * node.inputs[0].numel)
def rope_bwd(dy: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, upcast: str = "") -> Spec:
    """dx = dy * cos - rotate_half(dy) * sin: the rotation undone, since the two places of a frequency are equal"""
    return dy.like()


backward_by_decomposition(
    rope_bwd,
    rope,
    lambda dy, cos, sin, **attrs: ((dy, cos, sin), attrs, (dy,), (True, False, False), (None, None, None)),
)


@op(cost=lambda node: 8 * sum(out.numel for out in node.outputs))
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 0.0,
    weight_cast: str = "before",
    offset: float = 0.0,
    interleaved: bool = False,
    upcast: str = "",
) -> tuple[Spec, Spec]:
    """rope(rms_norm(q)), rope(rms_norm(k)): each head's norm, where there are weights, and its rotation

    q [B, A, T, D], k [B, K, T, D], weights [D], both or neither, cos and sin [B or 1, 1, T, 2n], 2n <= D. -> as q, k.
    Attributes are those of `rms_norm` and of `rope`.
    """
    require(q.ndim == k.ndim == 4, f"qk_norm_rope: q {q.shape}, k {k.shape}")
    same = q.dtype == k.dtype and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    require(same, f"qk_norm_rope: q {q}, k {k}")
    require((q_weight is None) == (k_weight is None), "qk_norm_rope: both norms or neither")
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            rms_norm.rule(x, weight, eps=eps, weight_cast=weight_cast, offset=offset)
        rope.rule(x, cos, sin, interleaved=interleaved, upcast=upcast)
    return q.like(), k.like()


@qk_norm_rope.decompose
def _(q, k, q_weight, k_weight, cos, sin, *, eps, weight_cast, offset, interleaved, upcast):
    def turned(x, weight):
        if x is None:
            return None
        if weight is not None:
            x = rms_norm(x, weight, eps=eps, weight_cast=weight_cast, offset=offset)
        return rope(x, cos, sin, interleaved=interleaved, upcast=upcast)

    return turned(q, q_weight), turned(k, k_weight)


@qk_norm_rope.vjp
def _(dys, ins, outs, needs, acc, **attrs):
    q, k, q_weight, k_weight, cos, sin = ins
    # A cotangent that is None: nothing reads that output, and nothing flows into its input or weight.
    wanted = tuple(needs[place] and dys[place % 2] is not None for place in range(4))
    if not any(wanted):
        return (None,) * 6
    raw = (None if dy is None or q_weight is None else x for dy, x in zip(dys, (q, k), strict=True))
    made = qk_norm_rope_bwd(*dys, *raw, q_weight, k_weight, cos, sin, needs=wanted, **attrs)
    found = iter(made if isinstance(made, tuple) else (made,))
    return *(next(found) if want else None for want in wanted), None, None


@op(cost=lambda node: 14 * sum(dy.numel for dy in node.inputs[:2] if dy is not None))
def qk_norm_rope_bwd(
    dq: Tensor | None,
    dk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    needs: tuple[bool, bool, bool, bool],
    eps: float,
    weight_cast: str,
    offset: float,
    interleaved: bool,
    upcast: str,
) -> tuple[Spec, ...]:
    """The rotation of dq and dk undone, then, where there are weights, `rms_norm_bwd` of each head of q and k

    Gives those of dq, dk, dq_weight, dk_weight that `needs` names. Without norms q and k are None; so are dq and q, or
    dk and k, where nothing reads that output.
    """
    given = zip((dq, dk, q_weight, k_weight), needs, strict=True)
    return tuple(t.like() for t, need in given if need and t is not None)


backward_by_decomposition(
    qk_norm_rope_bwd,
    qk_norm_rope,
    lambda dq, dk, q, k, q_weight, k_weight, cos, sin, *, needs, **attrs: (
        # A rotation's gradient does not depend on what was rotated: its cotangent stands in.
        (dq if q is None else q, dk if k is None else k, q_weight, k_weight, cos, sin),
        attrs,
        (dq, dk),
        (*needs, False, False),
        (None,) * 6,
    ),
)

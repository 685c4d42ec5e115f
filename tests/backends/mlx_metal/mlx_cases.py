"""A case for every op: small, odd shapes. Gradients reach the backward ops."""

from __future__ import annotations

import torch
from mlx_pair import TORCH, Case

from smedjan.checkpoint import affine, nf4
from smedjan.ops import activation as act
from smedjan.ops import attention as att
from smedjan.ops import elementwise as el
from smedjan.ops import embedding as emb
from smedjan.ops import glu, linear, lora, loss, norm, optimizer, quantized, random, rope, shape
from smedjan.ops.cache import kv_read, kv_write

_generator = torch.Generator().manual_seed(0)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=_generator) * scale


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=_generator)


def _elementwise() -> dict[str, Case]:
    x, pair = {"x": normal(3, 5, 7)}, {"a": normal(3, 5, 7), "b": normal(5, 1)}
    scalar = {"s": torch.tensor(0.37)}
    positive = {"x": normal(3, 7).abs() + 0.5}
    fixed = frozenset({"s"})
    return {
        "add": Case(lambda i: el.add(i["a"], i["b"]), pair, ("a", "b"), 21),
        "mul": Case(lambda i: el.mul(i["a"], i["b"]), pair, ("a", "b"), 21),
        "scale": Case(lambda i: el.scale(i["x"], factor=0.3), x, ("x",)),
        "scale_by": Case(lambda i: el.scale_by(i["x"], i["s"]), {**x, **scalar}, fixed=fixed),
        "divide_by": Case(lambda i: el.divide_by(i["x"], i["s"]), {**x, **scalar}, ("x",), fixed=fixed),
        "add_scalar": Case(lambda i: el.add_scalar(i["x"], value=0.1), x, ("x",)),
        "square": Case(lambda i: el.square(i["x"]), x, ("x",)),
        "rsqrt": Case(lambda i: el.rsqrt(i["x"]), positive, ("x",)),
        "sub": Case(lambda i: el.sub(i["a"], i["b"]), pair, ("a", "b"), 21),
        "div": Case(lambda i: el.div(i["a"], i["b"]), {**pair, "b": pair["b"].abs() + 0.5}, ("a", "b"), 21),
        "divide": Case(lambda i: el.divide(i["x"], divisor=0.3), x, ("x",)),
        "power": Case(lambda i: el.power(i["x"], exponent=3.0), x, ("x",)),
        "copy": Case(lambda i: el.copy(i["x"]), x),
        "silu": Case(lambda i: act.silu(i["x"]), x, ("x",)),
        "tanh": Case(lambda i: act.tanh(i["x"]), x, ("x",)),
        "relu": Case(lambda i: act.relu(i["x"]), x, ("x",)),
        "gelu": Case(lambda i: act.gelu(i["x"]), x, ("x",)),
        "gelu_tanh": Case(lambda i: act.gelu(i["x"], approximate="tanh"), x, ("x",)),
        "gelu_new": Case(lambda i: act.gelu_new(i["x"]), x, ("x",)),
        "relu2": Case(lambda i: act.relu2(i["x"]), x, ("x",)),
        "reshape": Case(lambda i: el.identity(el.reshape(i["x"], shape=(7, 15))), x, ("x",)),
        "cast": Case(lambda i: el.cast(el.cast(i["x"], "bfloat16"), i["x"].dtype), x, ("x",)),
        "ones": Case(lambda i: el.scale_by(i["x"], el.ones(graph=i["x"].graph)), x),
        "mean_last": Case(lambda i: norm.mean_last(i["x"]), x, ("x",), 7),
    }


def _rows() -> dict[str, Case]:
    ids = {"ids": integers(11, 2, 9), "w": normal(11, 5)}
    rows = {"x": normal(9, 5), "rows": torch.tensor([7, 0, 4])}
    return {
        "embedding": Case(lambda i: emb.embedding(i["ids"], i["w"]), ids, ("w",), 18),
        "embedding_padding": Case(lambda i: emb.embedding(i["ids"], i["w"], padding_idx=3), ids, ("w",), 18),
        "take_rows": Case(lambda i: emb.take_rows(i["x"], i["rows"]), rows, ("x",)),
    }


def _linear() -> dict[str, Case]:
    arrays = {"x": normal(2, 5, 13), "w": normal(7, 13), "b": normal(7)}
    mats = {"a": normal(2, 3, 5, 7), "b": normal(2, 3, 7, 4)}
    adapter = {**arrays, "la": normal(3, 13), "lb": normal(7, 3)}
    fixed = frozenset({"la", "lb"})  # adapters are float32 beside weights of any dtype

    def adapted(i):
        y = lora.lora_linear(i["x"], i["w"], i["b"], i["la"], i["lb"], scaling=1.5)
        return el.add(y, linear.linear(i["x"], i["w"]))  # read again, so that a cotangent waits at x

    return {
        "dora_norm": Case(
            lambda i: lora.dora_norm(i["w"], i["la"], i["lb"], scaling=2.0),
            {**adapter, "w": arrays["w"]},
            (),
            16,
            fixed,
        ),
        "lora_linear": Case(adapted, adapter, ("x", "la", "lb"), 16, fixed),
        "linear": Case(lambda i: linear.linear(i["x"], i["w"], i["b"]), arrays, ("x", "w", "b"), 13),
        "linear_no_bias": Case(lambda i: linear.linear(i["x"], i["w"]), arrays, ("x", "w"), 13),
        "matmul": Case(lambda i: linear.matmul(i["a"], i["b"]), mats, ("a", "b"), 7),
        "conv1d": Case(
            lambda i: linear.conv1d(i["x"], i["w"], i["b"]), {**arrays, "w": normal(13, 7)}, tuple("xwb"), 13
        ),
        "transpose_last": Case(lambda i: linear.transpose_last(i["a"]), mats, ("a",)),
    }


def _quantized() -> dict[str, Case]:
    """A weight of whole blocks, and one with a short last block and an odd count."""
    made = {}
    for name, outs, width in (("nf4_linear", 5, 128), ("nf4_linear odd", 7, 13)):
        parts = {key: TORCH.from_raw(raw) for key, raw in nf4.quantize(TORCH.to_raw(normal(outs, width))).items()}

        def product(i, shape=(outs, width)):
            return quantized.nf4_linear(i["x"], *(i[key] for key in quantized.nf4_specs(shape)), i["b"], shape=shape)

        arrays = {"x": normal(2, 3, width), **parts, "b": normal(outs)}
        made[name] = Case(product, arrays, ("x", "b"), width, frozenset(parts))
    for bits in quantized.AFFINE_BITS:
        for group_size in quantized.AFFINE_GROUPS if bits == 4 else (64,):
            made[f"affine_linear {bits} bits of {group_size}"] = _affine(bits, group_size)
    codes = (integers(255, 7, 13) - 127).to(torch.int8)
    arrays = {"x": normal(2, 3, 13), "c": codes, "s": normal(7).abs(), "b": normal(7)}
    return {
        **made,
        "int8_linear": Case(
            lambda i: quantized.int8_linear(i["x"], i["c"], i["s"], i["b"]), arrays, ("x", "b"), 13, frozenset("s")
        ),
        "nf4_quantize": Case(lambda i: quantized.nf4_quantize(i["w"]), {"w": normal(7, 13)}),
        "int8_quantize": Case(lambda i: quantized.int8_quantize(i["w"]), {"w": normal(7, 13)}),
    }


def affine_parts(rows: int, columns: int, bits: int, group_size: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales and biases of a normal weight."""
    raw = affine.quantize(TORCH.to_raw(normal(rows, columns)), bits=bits, group_size=group_size)
    codes, scales, biases = (TORCH.from_raw(part) for part in raw.values())
    return codes, scales, biases


def _affine(bits: int, group_size: int) -> Case:
    """As a table and, twice, as a weight: for x and for its gradient."""
    codes, scales, biases = affine_parts(11, 128, bits, group_size)
    held = {"bits": bits, "group_size": group_size}
    return Case(
        lambda i: (
            quantized.affine_linear(i["x"], i["c"], i["s"], i["z"], i["b"], **held),
            quantized.affine_embedding(i["ids"], i["c"], i["s"], i["z"], **held),
        ),
        {"x": normal(2, 3, 128), "c": codes, "s": scales, "z": biases, "b": normal(11), "ids": integers(11, 2, 5)},
        ("x", "b"),
        128,
    )


def _norm(rows: int, dim: int, cast: str, offset: float = 0.0) -> Case:
    """The residual read after the norm makes its cotangent wait: `acc`."""
    return Case(
        lambda i: el.add(i["x"], norm.rms_norm(i["x"], i["w"], eps=1e-5, weight_cast=cast, offset=offset)),
        {"x": normal(2, rows, dim), "w": 1 + normal(dim, scale=0.2)},
        ("x", "w"),
        dim + 2 * rows,
    )


def _add_norm(dim: int, cast: str = "", *, factor: float = 1.0, biased: bool = False) -> Case:
    """The sum is read again, as a residual stream is. rms_norm, or layer_norm where `cast` is empty."""
    arrays = {"x": normal(2, 5, dim), "r": normal(2, 5, dim), "w": 1 + normal(dim, scale=0.2)}
    if biased:
        arrays["b"] = normal(dim)

    def build(i):
        if cast:
            offset = 1.0 if cast == "after" else 0.0
            attrs = {"eps": 1e-5, "weight_cast": cast, "offset": offset, "factor": factor}
            total, y = norm.add_rms_norm(i["x"], i["r"], i["w"], **attrs)
        else:
            total, y = norm.add_layer_norm(i["x"], i["r"], i["w"], i.get("b"), eps=1e-5, factor=factor)
        return el.add(total, y)

    return Case(build, arrays, tuple(arrays), dim + 10)


def _layer_norm(rows: int, dim: int, biased: bool, composed: bool) -> Case:
    arrays = {"x": 2 + normal(2, rows, dim), "w": 1 + normal(dim, scale=0.2)}
    if biased:
        arrays["b"] = normal(dim)
    return Case(
        lambda i: norm.layer_norm(i["x"], i["w"], i.get("b"), eps=1e-5, composed=composed),
        arrays,
        tuple(arrays),
        dim + 2 * rows,
    )


def _shape() -> dict[str, Case]:
    x = {"x": normal(3, 5, 7)}

    def halves(i):
        first, _unread, last = shape.split(i["x"], sizes=(2, 3, 2), dim=-1)
        return shape.concat(last, first, dim=1)

    return {
        "slice_last": Case(lambda i: shape.slice_last(i["x"], start=2, stop=6), x, ("x",)),
        "split": Case(halves, x, ("x",)),
        "swap_heads": Case(lambda i: att.swap_heads(i["x"]), {"x": normal(2, 3, 5, 4)}, ("x",)),
    }


ROPES = {
    "default": {},
    "linear": {"factor": 8.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512, "truncate": False},
    "dynamic": {"factor": 2.0, "max_position_embeddings": 3},
}


def _rope(dim: int, rope_type: str, *, partial: float = 1.0, **attrs) -> Case:
    settings = ROPES.get(rope_type)
    if settings is None:  # longrope: past the original length, and not
        factors = {
            "short_factor": tuple(1 + 0.1 * n for n in range(dim // 2)),
            "long_factor": tuple(2 + 0.3 * n for n in range(dim // 2)),
        }
        original = 512 if rope_type == "longrope-long" else 1024
        settings = {**factors, "factor": 4.0, "original_max_position_embeddings": original}
    config = rope.RopeConfig(rope_type=rope_type.partition("-")[0], partial_rotary_factor=partial, **settings)
    interleaved = attrs.get("interleaved", False)

    def build(i):
        dtype = "float32" if attrs.get("upcast") == "terms" else i["x"].dtype
        cos, sin = rope.rope_tables(i["pos"], rope=config, head_dim=dim, dtype=dtype, interleaved=interleaved)
        return rope.rope(i["x"], cos, sin, **attrs), cos, sin

    # The device's own pow makes dynamic's frequencies, to an ulp or two, which a position p multiplies by p.
    step = 1 if rope_type == "dynamic" else 211
    return Case(build, {"x": normal(2, 3, 5, dim), "pos": torch.arange(5)[None] * step}, ("x",))


def _qk_rope(dim: int, *, norm: str = "", partial: float = 1.0, upcast: str = "", interleaved: bool = False) -> Case:
    """Queries and keys as a projection leaves them, [B, T, H D]: gradients of both, summed in one output."""
    config = rope.RopeConfig(rope_type="default", partial_rotary_factor=partial)
    arrays = {"q": normal(2, 5, 3 * dim), "k": normal(2, 5, 2 * dim), "pos": torch.arange(5)[None] * 211}
    if norm:
        arrays |= {"qw": 1 + normal(dim, scale=0.2), "kw": 1 + normal(dim, scale=0.2)}

    def build(i):
        dtype = "float32" if upcast == "terms" else i["q"].dtype
        tables = rope.rope_tables(i["pos"], rope=config, head_dim=dim, dtype=dtype, interleaved=interleaved)
        q, k = att.split_heads(i["q"], heads=3), att.split_heads(i["k"], heads=2)
        attrs = {"eps": 1e-5, "weight_cast": norm, "offset": float(norm == "after")} if norm else {}
        q, k = rope.qk_norm_rope(
            q, k, i.get("qw"), i.get("kw"), *tables, interleaved=interleaved, upcast=upcast, **attrs
        )
        return shape.concat(q, k, dim=1)

    wrt = tuple(name for name in arrays if name != "pos")
    return Case(build, arrays, wrt, dim + 30)


def _attention(
    heads: int,
    groups: int,
    seq: int,
    keys: int,
    dim: int,
    mask: str,
    kind: str = "attention",
    window: int = 0,
    cap: float = 0.0,
) -> Case:
    arrays = {"q": normal(2, heads, seq, dim), "k": normal(2, groups, keys, dim), "v": normal(2, groups, keys, dim)}
    if mask == "padded":
        seen = torch.ones(2, keys, dtype=torch.bool)
        seen[0, :2] = False
        arrays["mask"] = seen
    if mask == "packed":
        arrays["mask"] = torch.tensor([[0] * 2 + [1] * (keys - 2), [0] * (keys - 1) + [1]])

    def build(i):
        made = None
        if mask == "padded":
            made = att.padding_mask(i["mask"], queries=seq, window=window)
        if mask == "packed":
            made = att.document_mask(i["mask"], window=window)
        if mask == "lower":
            made = att.causal_mask(i["ids"], keys=keys, window=window)
        attrs = {"causal": mask == "causal" and seq > 1, "scale": dim**-0.5}
        if kind == "sdpa":
            return att.sdpa(i["q"], i["k"], i["v"], made, **attrs)
        return att.attention(
            i["q"], i["k"], i["v"], made, implementation=kind.replace("attention", "sdpa"), cap=cap, **attrs
        )

    if mask == "lower":
        arrays["ids"] = integers(5, 2, seq)
    return Case(build, arrays, ("q", "k", "v") if seq > 1 else (), max(keys, dim))


def _heads() -> dict[str, Case]:
    x, split = {"x": normal(2, 5, 12)}, {"x": normal(2, 4, 5, 3)}
    seen = {"m": torch.tensor([[False, True, True], [True, True, True]]), "x": normal(2, 1, 3, 3)}

    def bias(i):
        mask = att.padding_mask(i["m"], queries=3)
        return att.softmax(el.add(i["x"], att.mask_to_bias(mask, dtype=i["x"].dtype)))

    return {
        "split_heads": Case(lambda i: att.split_heads(i["x"], heads=4), x, ("x",)),
        "merge_heads": Case(lambda i: att.merge_heads(i["x"]), split, ("x",)),
        "repeat_kv": Case(lambda i: att.contiguous(att.repeat_kv(i["x"], times=3)), split, ("x",), 3),
        "softmax": Case(lambda i: att.softmax(i["x"]), split, ("x",), 3),
        "mask_to_bias": Case(bias, seen, ("x",), 3),
        "rotate_half": Case(lambda i: rope.rotate_half(i["x"]), x, ("x",)),
    }


def _loss() -> dict[str, Case]:
    labels = torch.tensor([3, -100, 0, 16, -100])
    head = {"x": normal(5, 6), "w": normal(17, 6), "labels": labels, "n": torch.tensor(3.0)}
    scores = {"x": normal(5, 17), "labels": labels}
    fixed = frozenset({"n"})

    def fused(grads, **shaping):
        return lambda i: loss.linear_cross_entropy(i["x"], i["w"], i["labels"], i["n"], grads=grads, **shaping)

    return {
        "log_softmax": Case(lambda i: loss.log_softmax(i["x"]), scores, ("x",), 17),
        "nll_loss": Case(lambda i: loss.nll_loss(i["x"], i["labels"]), scores, ("x",), 3),
        "pick": Case(lambda i: loss.pick(i["x"], i["labels"]), scores, ("x",)),
        "sum_trained": Case(lambda i: loss.sum_trained(i["x"], i["labels"]), scores, ("x",), 51),
        "smooth_loss": Case(lambda i: loss.smooth_loss(i["x"], i["labels"]), scores, ("x",), 51),
        "linear_cross_entropy": Case(fused("xw"), head, ("x", "w"), 17, fixed),
        "linear_cross_entropy_x": Case(fused("x"), head, ("x",), 17, fixed),
        "linear_cross_entropy_shaped": Case(
            fused("xw", scaling=0.7, divisor=1.3, cap=2.0), head, ("x", "w"), 17, fixed
        ),
        "linear_cross_entropy_smoothed": Case(fused("xw", smoothing=0.2), head, ("x", "w"), 17, fixed),
        "linear_cross_entropy_z_loss": Case(fused("xw", z_loss=0.05), head, ("x", "w"), 17, fixed),
        "linear_cross_entropy_terms": Case(fused("x", cap=2.0, z_loss=0.05, smoothing=0.2), head, ("x",), 17, fixed),
        "linear_cross_entropy_none": Case(fused(""), head, (), 17, fixed),
    }


def _random() -> dict[str, Case]:
    arrays = {"x": normal(3, 5, 7), "key": torch.tensor([2**32 - 1, 5, 9, 2])}
    return {
        "dropout": Case(lambda i: random.dropout(i["x"], i["key"], p=0.3, site=4), arrays, ("x",)),
        "keep_mask": Case(lambda i: random.keep_mask(i["key"], shape=(3, 7), p=0.3, site=1), arrays),
        "uniform": Case(lambda i: random.uniform(i["key"], shape=(3, 7), bound=0.3, site=1), arrays),
    }


def _optimizer() -> dict[str, Case]:
    grads = {"a": normal(5, 7), "b": normal(11)}
    return {
        "accumulate": Case(lambda i: optimizer.accumulate(i["x"], i["g"]), {"x": normal(3, 5), "g": normal(3, 5)}),
        "global_norm": Case(lambda i: optimizer.global_norm(i["a"], i["b"]), grads, depth=46),
        "clip": Case(lambda i: optimizer.clip_coefficient(optimizer.global_norm(i["a"], i["b"]), max_norm=1.0), grads),
    }


def _steps() -> dict[str, Case]:
    """What optimizers' steps are made of."""
    x, pair = {"x": normal(3, 5, 7)}, {"x": normal(3, 5), "g": normal(3, 5)}
    quotient = {"a": normal(3, 5), "b": normal(5).abs() + 0.5}
    product = {"c": normal(6, 7), "y": normal(6, 5), "w": normal(5, 7)}
    return {
        **{
            f"keep_{norm}": Case(
                lambda i: optimizer.keep(i["x"], i["g"], i["n"]), {**pair, "n": torch.tensor(norm)}, depth=0
            )
            for norm in (2.0, float("inf"), float("nan"))
        },
        "div": Case(lambda i: el.div(i["a"], i["b"]), quotient),
        "sign": Case(lambda i: el.sign(i["x"]), {"x": torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])}, depth=0),
        "clamp": Case(lambda i: el.clamp(i["x"], low=-0.5, high=0.75), x, depth=0),
        "linear_dx_add": Case(lambda i: linear.linear_dx_add(i["c"], i["y"], i["w"]), product, depth=6),
    }


CASES: dict[str, Case] = {
    **_elementwise(),
    **_rows(),
    **_linear(),
    **{f"rms_norm_{cast}_{dim}": _norm(5, dim, cast) for cast in ("before", "after") for dim in (1, 33)},
    **{f"rms_norm_offset_{dim}": _norm(5, dim, "after", 1.0) for dim in (1, 33)},
    "layer_norm": _layer_norm(5, 33, True, False),
    "layer_norm_composed": _layer_norm(5, 33, False, True),
    "add_rms_norm": _add_norm(33, "before"),
    "add_rms_norm_after": _add_norm(33, "after", factor=0.3),
    "add_layer_norm": _add_norm(33, biased=True, factor=0.3),
    "add_layer_norm_no_bias": _add_norm(33),
    **_shape(),
    **{f"rope_{kind}_{dim}": _rope(dim, kind) for kind in ("default", "linear", "llama3") for dim in (2, 64)},
    **{f"rope_{kind}": _rope(16, kind) for kind in ("yarn", "dynamic", "longrope-short", "longrope-long")},
    "rope_partial": _rope(16, "default", partial=0.5),
    "rope_interleaved": _rope(16, "default", interleaved=True, upcast="input"),
    "qk_norm_rope": _qk_rope(64, norm="before"),
    "qk_norm_rope_after": _qk_rope(16, norm="after", partial=0.5, upcast="terms"),
    "qk_rope": _qk_rope(16, interleaved=True, upcast="input"),
    "qk_rope_odd": _qk_rope(10),
    "rope_terms": _rope(16, "default", upcast="terms"),
    **{
        f"glu_{name}": Case(
            lambda i, name=name: glu.glu(i["a"], i["b"], act=name), {"a": normal(3, 7), "b": normal(3, 7)}, ("a", "b")
        )
        for name in ("gelu", "gelu_pytorch_tanh", "relu2")
    },
    "glu": Case(lambda i: glu.glu(i["a"], i["b"]), {"a": normal(3, 7, scale=3), "b": normal(3, 7)}, ("a", "b")),
    **_heads(),
    "attention_causal": _attention(6, 2, 7, 7, 10, "causal"),
    "attention_one_head": _attention(1, 1, 5, 5, 3, "causal"),
    "attention_full": _attention(4, 4, 3, 9, 8, "none"),
    "attention_padded": _attention(4, 2, 7, 7, 6, "padded"),
    "attention_packed": _attention(4, 2, 7, 7, 6, "packed"),
    "attention_lower": _attention(3, 3, 6, 6, 6, "lower", "eager"),
    "attention_window": _attention(4, 2, 7, 7, 6, "lower", window=3),
    "attention_window_padded": _attention(4, 2, 7, 7, 6, "padded", window=3),
    "attention_window_packed": _attention(4, 2, 7, 7, 6, "packed", window=2),
    "attention_capped": _attention(4, 2, 7, 7, 6, "lower", "eager", cap=2.0),
    "attention_decode": _attention(6, 2, 1, 9, 16, "none"),
    "attention_decode_padded": _attention(6, 2, 1, 9, 16, "padded"),
    "sdpa": _attention(4, 2, 7, 7, 64, "causal", "sdpa"),
    **_loss(),
    **_random(),
    **_optimizer(),
    **_quantized(),
    **_steps(),
}

CACHE_OPS = {kv_write.name, kv_read.name}
"""Run by their own test: their positions are host integers."""

"""Rotary positions in `config.json`, in both spellings.

Older files say `rope_theta` + `rope_scaling`, those of transformers 5 `rope_parameters`: both are read, a contradiction
between them is an error, and both are written, since most readers know only the older one. Families with two kinds of
attention have one set of parameters for each (`rope_parameters.full_attention`, `.sliding_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from smedjan.models.config import ConfigReader
from smedjan.ops.rope import ROPE_TYPES, RopeConfig

__all__ = ["RopeConfig", "RopeKeys", "read_rope", "read_rope_of_each", "write_rope"]

_FACTOR = {"linear", "dynamic", "llama3", "yarn", "longrope"}
_ORIGINAL = {"llama3", "yarn", "longrope"}


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """What a family calls its rotary settings outside the tables, and the values that it takes where they are absent.

    partial: None where the family turns whole heads and knows no such key. original: the family's default, where it
    keeps original_max_position_embeddings beside the tables.
    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    partial: str | None = None
    default_partial: float = 1.0
    types: tuple[str, ...] = ROPE_TYPES
    original: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Context:
    keys: RopeKeys
    head_dim: int
    max_positions: int
    theta: float | None
    partial: float | None
    original: int | None


def read_rope(reader: ConfigReader, *, head_dim: int, max_positions: int, keys: RopeKeys | None = None) -> RopeConfig:
    """Rotary positions from either spelling, or from both where they agree."""
    context = _outer(reader, head_dim, max_positions, keys or RopeKeys())
    found: dict[str, RopeConfig] = {}
    for name in ("rope_scaling", "rope_parameters"):
        table = reader.table(name)
        if table is not None:
            found[name] = _read_table(table, context, name)
    if len(found) == 2:
        _agree(reader, context, found)
    if found:
        return found.get("rope_parameters") or found["rope_scaling"]
    if context.theta is None:
        reader.absent("rope_parameters", _spelt(_default(context)))
    if "rope_scaling" not in reader.data:
        reader.absent("rope_scaling", None)
    if context.keys.partial is not None and context.partial is None:
        reader.absent(context.keys.partial, context.keys.default_partial)
    return _default(context)


def read_rope_of_each(
    reader: ConfigReader,
    *,
    head_dim: int,
    max_positions: int,
    keys: RopeKeys,
    local_theta: tuple[str | None, float],
) -> dict[str, RopeConfig]:
    """{"full_attention": ..., "sliding_attention": ...}. The older spelling speaks of full attention alone;
    `local_theta` is the key of sliding attention's theta there, if it has one, and the default."""
    context = _outer(reader, head_dim, max_positions, keys)
    full = _default(context)
    scaling = reader.table("rope_scaling")
    if scaling is not None:
        full = _read_table(scaling, context, "rope_scaling")
    key, default = local_theta
    local = reader.number(key, low=0.0, open_low=True) if key is not None and reader.has(key) else None
    reader.inert(*([key] if key else []))
    context_local = replace(context, theta=local, keys=replace(keys, default_theta=default, theta=key or keys.theta))
    old = {"full_attention": full, "sliding_attention": _default(context_local)}
    tables = reader.table("rope_parameters")
    if tables is None:
        if context.theta is None or local is None:
            reader.absent("rope_parameters", {kind: _spelt(rope) for kind, rope in old.items()})
        if "rope_scaling" not in reader.data:
            reader.absent("rope_scaling", None)
        return old
    new = dict(old)
    for kind, inner in (("full_attention", context), ("sliding_attention", context_local)):
        table = tables.table(kind)
        if table is not None:
            new[kind] = _read_table(table, inner, f"rope_parameters.{kind}")
        elif inner.theta is None:
            tables.absent(kind, _spelt(old[kind]))
    tables.finish()
    if scaling is not None and new["full_attention"] != full:
        _differ(reader, context, "rope_scaling", full, "rope_parameters.full_attention", new["full_attention"])
    return new


def _spelt(rope: RopeConfig) -> dict[str, Any]:
    return {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}


def _outer(reader: ConfigReader, head_dim: int, max_positions: int, keys: RopeKeys) -> _Context:
    theta = reader.number(keys.theta, low=0.0, open_low=True) if reader.has(keys.theta) else None
    partial = None
    if keys.partial is not None:
        partial = reader.number(keys.partial, low=0.0, open_low=True) if reader.has(keys.partial) else None
        reader.inert(keys.partial)
    if keys.partial != "partial_rotary_factor":
        reader.only("partial_rotary_factor", None, 1, 1.0, remedy="models of this type rotate the whole head")
    original = None
    if keys.original is not None or reader.has("original_max_position_embeddings"):
        original = reader.optional_integer("original_max_position_embeddings", keys.original, low=1)
    reader.inert(keys.theta, "original_max_position_embeddings")
    reader.values.pop("original_max_position_embeddings", None)
    if original is not None:
        reader.values["original_max_position_embeddings"] = original
    context = _Context(
        keys=keys, head_dim=head_dim, max_positions=max_positions, theta=theta, partial=partial, original=original
    )
    _check_dim(reader, context, partial if partial is not None else keys.default_partial, keys.partial or "head_dim")
    return context


def _check_dim(reader: ConfigReader, context: _Context, partial: float, field: str) -> None:
    dim = int(context.head_dim * partial)
    if partial > 1 or dim < 2 or dim % 2:
        raise reader.error(
            f"makes {dim} of a head's {context.head_dim} dims rotary", field, "it must be an even number of them"
        )


def _default(context: _Context) -> RopeConfig:
    keys = context.keys
    return RopeConfig(
        rope_theta=context.theta if context.theta is not None else keys.default_theta,
        partial_rotary_factor=context.partial if context.partial is not None else keys.default_partial,
    )


def _read_table(table: ConfigReader, context: _Context, name: str) -> RopeConfig:
    kind = _kind(table, context, name)
    plain = _default(context)
    made: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": plain.rope_theta,
        "partial_rotary_factor": plain.partial_rotary_factor,
    }
    for field, outer in (("rope_theta", context.theta), ("partial_rotary_factor", context.partial)):
        if not table.has(field):
            table.inert(field)
            if outer is None and (field == "rope_theta" or context.keys.partial is not None):
                table.absent(field, made[field])
            continue
        made[field] = table.number(field, low=0.0, open_low=True)
        if outer is not None and made[field] != outer:
            outside = context.keys.theta if field == "rope_theta" else context.keys.partial
            message = f"are {outer:g} and {made[field]:g}"
            raise _outside(table, outside or field, f"{name}.{field}", message)
    if context.keys.partial is None and made["partial_rotary_factor"] != 1:
        raise table.error(
            f"is {made['partial_rotary_factor']:g}", "partial_rotary_factor", "models of this type rotate whole heads"
        )
    _check_dim(table, context, made["partial_rotary_factor"], "partial_rotary_factor")
    if kind in _ORIGINAL:
        made["original_max_position_embeddings"] = _original(table, context, name)
    if kind in _FACTOR:
        made["factor"] = _factor(table, kind, made.get("original_max_position_embeddings"), context.max_positions)
    _SCALINGS.get(kind, lambda *_: None)(table, made, context)
    table.finish()
    return RopeConfig(**made)


def _outside(table: ConfigReader, left: str, right: str, message: str) -> Exception:
    plain = ConfigReader(table.data, table.file)
    return plain.error(message, f"{left} and {right}", "keep one")


def _kind(table: ConfigReader, context: _Context, name: str) -> str:
    table.inert("rope_type", "type")
    options = (*context.keys.types, "su") if "longrope" in context.keys.types else context.keys.types
    kinds = [table.choice(key, options) for key in ("rope_type", "type") if table.has(key)]
    kinds = ["longrope" if kind == "su" else kind for kind in kinds]  # Phi-3's first name for it
    if not kinds:
        plain = {"rope_theta", "partial_rotary_factor", "rope_type", "type", *table.ignore_keys}
        if name == "rope_scaling" or set(table.data) - plain:
            raise table.error("is missing", "rope_type", f"supported: {', '.join(sorted(options))}")
        table.absent("rope_type", "default")
    if len(set(kinds)) == 2:
        raise table.contradiction("rope_type", "type", f"are {kinds[0]!r} and {kinds[1]!r}", "keep one")
    return kinds[0] if kinds else "default"


def _original(table: ConfigReader, context: _Context, name: str) -> int:
    key = "original_max_position_embeddings"
    inner = table.integer(key, low=1) if table.has(key) else None
    table.inert(key)
    if inner is not None and context.original is not None and inner != context.original:
        raise _outside(table, key, f"{name}.{key}", f"are {context.original} and {inner}")
    if inner is None and context.original is None:
        table.absent("original_max_position_embeddings", context.max_positions)
    return inner or context.original or context.max_positions


def _factor(table: ConfigReader, kind: str, original: int | None, max_positions: int) -> float:
    if kind in ("yarn", "longrope") and not table.has("factor"):
        table.inert("factor")
        assert original is not None
        table.optional("factor")
        table.absent("factor", max_positions / original)
        return max_positions / original
    return table.number("factor", low=0.0, open_low=True)


def _dynamic(table: ConfigReader, made: dict[str, Any], context: _Context) -> None:
    made["max_position_embeddings"] = context.max_positions
    if context.head_dim * made["partial_rotary_factor"] <= 2:
        raise table.error("is dynamic", "rope_type", "that needs more than 2 rotary dims")


def _llama3(table: ConfigReader, made: dict[str, Any], context: _Context) -> None:
    for field in ("low_freq_factor", "high_freq_factor"):
        made[field] = table.number(field, low=0.0, open_low=True)
    if made["high_freq_factor"] <= made["low_freq_factor"]:
        raise table.contradiction(
            "low_freq_factor",
            "high_freq_factor",
            f"are {made['low_freq_factor']:g} and {made['high_freq_factor']:g}",
            "the high one must be the larger",
        )


def _yarn(table: ConfigReader, made: dict[str, Any], context: _Context) -> None:
    table.optional(*_YARN, "truncate")
    for field in _YARN:
        # transformers takes 0 for "not given".
        made[field] = table.optional_number(field, open_low=True)
    # mscale 1 alone is what is computed without either; Arcee's files have it.
    if bool(made["mscale"]) != bool(made["mscale_all_dim"]) and made["mscale"] != 1:
        raise table.contradiction(
            "mscale",
            "mscale_all_dim",
            f"are {made['mscale']} and {made['mscale_all_dim']}",
            "one alone is not computed: give both above 0, or neither",
        )
    made["truncate"] = table.flag("truncate", True)
    if (made["beta_fast"] or 32) < (made["beta_slow"] or 1):
        raise table.contradiction(
            "beta_fast", "beta_slow", f"are {made['beta_fast']} and {made['beta_slow']}", "the fast one is the larger"
        )


def _longrope(table: ConfigReader, made: dict[str, Any], context: _Context) -> None:
    count = int(context.head_dim * made["partial_rotary_factor"]) // 2
    for field in ("short_factor", "long_factor"):
        made[field] = table.numbers(field, count)
    table.optional("attention_factor")
    made["attention_factor"] = table.optional_number("attention_factor", open_low=True)


_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_SCALINGS = {"dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _agree(reader: ConfigReader, context: _Context, found: dict[str, RopeConfig]) -> None:
    """rope_scaling seldom carries its own rope_theta: it then stands under rope_parameters alone."""
    old, new = found["rope_scaling"], found["rope_parameters"]
    if context.theta is None and "rope_theta" not in reader.data["rope_scaling"]:
        old = replace(old, rope_theta=new.rope_theta)
    if context.partial is None and "partial_rotary_factor" not in reader.data["rope_scaling"]:
        old = replace(old, partial_rotary_factor=new.partial_rotary_factor)
    if old != new:
        _differ(reader, context, "rope_scaling", old, "rope_parameters", new)


def _differ(reader: ConfigReader, context: _Context, left: str, old: RopeConfig, right: str, new: RopeConfig) -> None:
    for field in fields(RopeConfig):
        one, other = getattr(old, field.name), getattr(new, field.name)
        if one != other:
            raise reader.contradiction(
                f"{left}.{field.name}", f"{right}.{field.name}", f"are {one!r} and {other!r}", "keep one"
            )


def _table_of(rope: RopeConfig, *, partial: bool) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field in fields(RopeConfig):
        value = getattr(rope, field.name)
        if value is None or field.name in ("rope_type", "rope_theta", "max_position_embeddings"):
            continue
        if field.name == "partial_rotary_factor" and not partial:
            continue
        made[field.name] = list(value) if isinstance(value, tuple) else value
    return made


def write_rope(rope: RopeConfig, keys: RopeKeys | None = None) -> dict[str, Any]:
    """The keys of `config.json` in both spellings: `rope_theta`, `rope_scaling` and `rope_parameters`."""
    keys = keys or RopeKeys()
    table = _table_of(rope, partial=keys.partial is not None)
    scaling = {name: value for name, value in table.items() if name != "partial_rotary_factor"}
    written: dict[str, Any] = {
        keys.theta: rope.rope_theta,
        # transformers before 4.43 and mlx-lm look for `type`, later ones for `rope_type`.
        "rope_scaling": (
            None if rope.rope_type == "default" else {"type": rope.rope_type, "rope_type": rope.rope_type, **scaling}
        ),
        "rope_parameters": {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta, **table},
    }
    if keys.partial is not None:
        written[keys.partial] = rope.partial_rotary_factor
    return written


def write_rope_of_each(
    ropes: dict[str, RopeConfig], keys: RopeKeys, local_theta: tuple[str | None, float]
) -> dict[str, Any]:
    """Both spellings of `read_rope_of_each`'s two sets; the older one where it can say them."""
    full, local = ropes["full_attention"], ropes["sliding_attention"]
    nested = {
        kind: {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta, **_table_of(rope, partial=False)}
        for kind, rope in ropes.items()
    }
    written: dict[str, Any] = {"rope_parameters": nested}
    key, default = local_theta
    if local.rope_type == "default" and (key is not None or local.rope_theta == default):
        written[keys.theta] = full.rope_theta
        written["rope_scaling"] = write_rope(full, keys)["rope_scaling"]
        if key is not None:
            written[key] = local.rope_theta
    return written

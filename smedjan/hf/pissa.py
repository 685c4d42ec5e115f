"""PiSSA (Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", eq. 2 to 4): adapters
that start as the principal part of their weight, while what is left of it is frozen.

    W = U S V^T       A0 = (S / s)^(1/2) V^T of the r largest singular values, B0 = U (S / s)^(1/2), s the scaling
    y = (W - s B0 A0) x + s B A x, from A = A0 and B = B0

What is trained means something over that residual alone. What is saved is therefore always a plain adapter of rank 2 r
for the weights as they are (peft's `path_initial_model_for_weight_conversion`):

    s (B A - B0 A0) = s [B, -B0] [A; A0]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec, specs_of
from smedjan.errors import ConfigError
from smedjan.passes.lora import Lora, a_name, b_name, module_of


def iterations(init: str) -> int | None:
    """N of `pissa_niter_N`: rounds of a randomised SVD; None of `pissa`: the SVD itself."""
    _, _, number = init.partition("_niter_")
    return int(number) if number else None


def initial(lora: Lora, base: Mapping[str, RawTensor], init: str, seed: int) -> dict[str, RawTensor]:
    """A0 [r, in] and B0 [out, r] of every target, float32, computed in float32."""
    made: dict[str, RawTensor] = {}
    shapes = {name: spec.shape for name, spec in specs_of(base).items()}
    for site, name in enumerate(n for n in lora.shapes(shapes) if ".lora_A." in n):
        module = module_of(name)
        weight, rank = _matrix(base[f"{module}.weight"], lora), lora.rank_of(module)
        if rank > min(weight.shape):
            raise ConfigError(
                f"{rank} is more than the {min(weight.shape)} singular values of {module}",
                field="lora.rank",
                remedy=f"give --lora.rank {min(weight.shape)} or less, or --lora.init random",
            )
        rounds = iterations(init)
        if rounds is None:
            u, s, vt = np.linalg.svd(weight, full_matrices=False)
        else:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, site])))
            u, s, vt = svd_lowrank(weight, rank, rounds, generator)
        u, vt = signed(u[:, :rank], vt[:rank])
        root = np.sqrt(s[:rank] / np.float32(lora.scaling_of(module)))
        made[a_name(module)] = RawTensor.of(np.ascontiguousarray(root[:, None] * vt))
        made[b_name(module)] = RawTensor.of(np.ascontiguousarray(u * root))
    return made


def svd_lowrank(
    weight: np.ndarray, rank: int, rounds: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `rank` largest singular triplets, near enough (Halko et al. 2011, algorithms 4.4 and 5.1; torch.svd_lowrank).

    weight [m, n] -> U [m, rank], S [rank], V^T [rank, n]
    """
    if weight.shape[0] < weight.shape[1]:
        v, s, ut = svd_lowrank(weight.T, rank, rounds, generator)
        return ut.T, s, v.T
    q, _ = np.linalg.qr(weight @ generator.standard_normal((weight.shape[1], rank), dtype=np.float32))
    for _ in range(rounds):
        q, _ = np.linalg.qr(weight.T @ q)
        q, _ = np.linalg.qr(weight @ q)
    u, s, vt = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vt


def signed(u: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with the largest element of each row of V^T positive: an SVD leaves the signs of pairs open."""
    largest = np.abs(vt).argmax(axis=1)
    signs = np.where(vt[np.arange(len(vt)), largest] < 0, np.float32(-1), np.float32(1))
    return u * signs, vt * signs[:, None]


def residual(lora: Lora, base: Mapping[str, RawTensor], start: Mapping[str, RawTensor]) -> LazyTensors:
    """The base with W - s B0 A0 in the place of each adapted weight: float32, made when it is asked for."""

    def entry(name: str, spec: TensorSpec) -> LazyTensor:
        module = name.removesuffix(".weight")
        if a_name(module) not in start:
            return LazyTensor(spec=spec, file=Path(name), load=_get(base, name))
        wide = TensorSpec(dtype="float32", shape=spec.shape)
        return LazyTensor(spec=wide, file=Path(name), load=lambda: _residual(lora, base[name], module, start))

    return LazyTensors({name: entry(name, spec) for name, spec in specs_of(base).items()})


def _get(base: Mapping[str, RawTensor], name: str) -> Callable[[], RawTensor]:
    return lambda: base[name]


def _residual(lora: Lora, weight: RawTensor, module: str, start: Mapping[str, RawTensor]) -> RawTensor:
    product = values(start[b_name(module)]) @ values(start[a_name(module)])
    left = _matrix(weight, lora) - np.float32(lora.scaling_of(module)) * product
    return RawTensor.of(np.ascontiguousarray(left.T if lora.transposed else left))


def plain(
    lora: Lora, trained: Mapping[str, RawTensor], start: Mapping[str, RawTensor]
) -> tuple[Lora, dict[str, RawTensor]]:
    """The adapter of twice the rank that means over the base what `trained` means over the residual of `start`."""
    made: dict[str, RawTensor] = {}
    for name, tensor in trained.items():
        if ".lora_A." in name:
            made[name] = RawTensor.of(np.concatenate([values(tensor), values(start[name])], axis=0))
        elif ".lora_B." in name:
            made[name] = RawTensor.of(np.concatenate([values(tensor), -values(start[name])], axis=1))
        else:
            made[name] = tensor
    factor = sqrt(2.0) if lora.rslora else 2.0  # so that the scaling stays
    doubled = replace(
        lora,
        rank=2 * lora.rank,
        alpha=factor * lora.alpha,
        ranks=tuple((name, 2 * rank) for name, rank in lora.ranks),
        alphas=tuple((name, factor * alpha) for name, alpha in lora.alphas),
    )
    return doubled, made


def parted(lora: Lora, tensors: Mapping[str, RawTensor]) -> tuple[Lora, dict[str, RawTensor], dict[str, RawTensor]]:
    """What `plain` was made of: (the adapter's settings, what was trained, its start)."""
    trained, start = {}, {}
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            parts = np.split(values(tensor), 2, axis=0)
            trained[name], start[name] = (RawTensor.of(np.ascontiguousarray(part)) for part in parts)
        elif ".lora_B." in name:
            one, other = np.split(values(tensor), 2, axis=1)
            trained[name], start[name] = (RawTensor.of(np.ascontiguousarray(part)) for part in (one, -other))
        else:
            trained[name] = tensor
    factor = sqrt(2.0) if lora.rslora else 2.0
    halved = replace(
        lora,
        rank=lora.rank // 2,
        alpha=lora.alpha / factor,
        ranks=tuple((name, rank // 2) for name, rank in lora.ranks),
        alphas=tuple((name, alpha / factor) for name, alpha in lora.alphas),
    )
    return halved, trained, start


def values(tensor: RawTensor) -> np.ndarray:
    return to_float32(tensor).reshape(tensor.shape)


def _matrix(weight: RawTensor, lora: Lora) -> np.ndarray:
    """W as [out, in], float32."""
    found = values(weight)
    return found.T if lora.transposed else found

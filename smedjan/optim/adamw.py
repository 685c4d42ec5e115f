"""AdamW's step as one graph: global norm, clip, update of every parameter, on the device from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from smedjan.graph.node import Graph
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import cast, scale_by
from smedjan.ops.optimizer import (
    BLOCK,
    adamw_bucket,
    adamw_step,
    bucket_lists,
    clip_coefficient,
    global_norm,
    norm_and_clip,
)

Parameters = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each trained parameter."""

STATES = ("same", "float32", "bfloat16", "8bit")
ROUNDINGS = ("nearest", "stochastic")

EIGHT_BIT_FROM = 4096
"""Values from which a parameter's state is quantised, as in bitsandbytes: small ones are cheap, and touchy (norms)."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Loshchilov & Hutter 2019, with torch.optim.AdamW's meaning of each number; `clip` is a global norm, 0: none.

    With `master`, a parameter narrower than float32 has a float32 copy that is updated in its place and rounded to it:
    a step smaller than the parameter's own rounding is not lost. Without one, `rounding="stochastic"` keeps such steps
    in the mean: the new bfloat16 parameter is rounded up or down by chance (`stochastic_round`).

    `state_dtype` is that of the moments as they are kept:
    same       that of what is updated, the master where there is one
    float32
    bfloat16   exp_avg rounded to nearest: it moves by 1 - beta1, a tenth of itself, a step. exp_avg_sq by chance: it
               moves by 1 - beta2, a thousandth, and half an ulp of bfloat16 is 2^-9, so that to nearest it would stand
               still at its largest value
    8bit       blocks of 256 values under a float32 scale each (`quantize_blocks`; Dettmers et al. 2022). Blocks begin
               with each parameter, so that a checkpoint holds state by name and a bucket may hold parameters in any
               order: a parameter whose size is no multiple of 256, or below `EIGHT_BIT_FROM`, has float32 state

    `rates` are factors of the learning rate for parameters of some names, the first that matches (`named`): LoRA+
    (Hayou et al. 2024) is (("lora_B", 16.0),).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    master: bool = False
    state_dtype: str = "same"
    rounding: str = "nearest"
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        assert self.state_dtype in STATES, self.state_dtype
        assert self.rounding in ROUNDINGS, self.rounding

    def has_master(self, dtype: str) -> bool:
        return self.master and dtype in ("bfloat16", "float16")

    def rate(self, name: str) -> float:
        """The factor of this parameter's learning rate."""
        return next((factor for part, factor in self.rates if named(name, part)), 1.0)

    def learning_rates(self, lr: float, parameters: Parameters) -> dict[str, float]:
        """The inputs of the graph that are learning rates: one for each factor that a parameter has."""
        return {_lr_input(factor): lr * factor for factor in dict.fromkeys(map(self.rate, parameters))}

    def stored(self, shape: tuple[int, ...], dtype: str) -> str:
        """Dtype of a parameter's two moments as they are kept: "uint8" are codes."""
        if self.state_dtype == "8bit":
            return "uint8" if prod(shape) % BLOCK == 0 and prod(shape) >= EIGHT_BIT_FROM else "float32"
        return ("float32" if self.has_master(dtype) else dtype) if self.state_dtype == "same" else self.state_dtype

    def by_chance(self, dtype: str) -> tuple[bool, bool]:
        """Whether a parameter of this dtype, and its second moment, are rounded stochastically."""
        param = self.rounding == "stochastic" and dtype == "bfloat16" and not self.has_master(dtype)
        return param, self.state_dtype == "bfloat16"

    def seeded(self, parameters: Parameters) -> bool:
        """Whether the graph has an input `seed`, a host scalar."""
        return any(any(self.by_chance(dtype)) for _, dtype in parameters.values())

    def state(self, parameters: Parameters) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array that the optimizer keeps: exp_avg.NAME, exp_avg_sq.NAME, master.NAME, and for
        codes exp_avg_absmax.NAME and exp_avg_sq_absmax.NAME. All but masters begin as zeros."""
        made: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, (shape, dtype) in parameters.items():
            stored = self.stored(shape, dtype)
            made[f"exp_avg.{name}"] = made[f"exp_avg_sq.{name}"] = (shape, stored)
            if stored == "uint8":
                scales = ((prod(shape) // BLOCK,), "float32")
                made[f"exp_avg_absmax.{name}"] = made[f"exp_avg_sq_absmax.{name}"] = scales
            if self.has_master(dtype):
                made[f"master.{name}"] = (shape, "float32")
        return made

    def state_bytes(self, parameters: Parameters) -> int:
        return sum(Spec(*kept).nbytes for kept in self.state(parameters).values())

    def graph(self, parameters: Parameters, *, exact: bool, buckets: bool = False) -> Graph:
        """Inputs NAME, grad.NAME, the state, `learning_rates`, step and, where something is rounded by chance, seed;
        the parameters and the state back, and the unclipped grad_norm.

        An exact backend multiplies each gradient by the coefficient first, as clip_grad_norm_ does; a fast one folds
        the coefficient into the update. With `buckets`, one `adamw_bucket` has all parameters that are alike.
        """
        assert not (exact and buckets), "a bucket folds the coefficient"
        graph = Graph()
        rates = {name: graph.input(name, (), "float32") for name in self.learning_rates(1.0, parameters)}
        step = graph.input("step", (), "int64")
        seed = graph.input("seed", (), "int64") if self.seeded(parameters) else None
        state = {name: graph.input(name, shape, dtype) for name, (shape, dtype) in self.state(parameters).items()}
        grads = {name: graph.input(f"grad.{name}", shape, dtype) for name, (shape, dtype) in parameters.items()}
        coefficient: Tensor | None
        if buckets and self.clip > 0:
            norm, coefficient = norm_and_clip(*grads.values(), max_norm=self.clip)
        else:
            norm = global_norm(*grads.values())
            coefficient = clip_coefficient(norm, max_norm=self.clip) if self.clip > 0 else None
        graph.output("grad_norm", norm)
        scalars = (step, seed, coefficient)
        if buckets:
            self._buckets(graph, parameters, grads, state, rates, scalars)
        else:
            for site, (name, (shape, dtype)) in enumerate(parameters.items()):
                held = state[f"master.{name}"] if self.has_master(dtype) else graph.input(name, shape, dtype)
                lr = rates[_lr_input(self.rate(name))]
                self._update(graph, site, name, dtype, held, grads[name], state, (lr, *scalars), exact=exact)
        return graph

    @property
    def _attrs(self) -> dict[str, Any]:
        return {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "weight_decay": self.weight_decay}

    def _update(
        self,
        graph: Graph,
        site: int,
        name: str,
        dtype: str,
        held: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        scalars: tuple[Tensor | None, ...],
        *,
        exact: bool,
    ) -> None:
        lr, step, seed, coefficient = scalars
        assert lr is not None
        assert step is not None
        moments = state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"]
        absmax = None
        if moments[0].dtype == "uint8":
            absmax = state[f"exp_avg_absmax.{name}"], state[f"exp_avg_sq_absmax.{name}"]
        gradient = cast(gradient, held.dtype)
        coefficient = None if coefficient is None else cast(coefficient, held.dtype)
        if exact and coefficient is not None:
            gradient, coefficient = scale_by(gradient, coefficient), None
        made = iter(
            adamw_step(
                held,
                gradient,
                *moments,
                absmax,
                lr,
                step,
                seed,
                coefficient,
                site=site,
                narrow=dtype if self.has_master(dtype) else "",
                stochastic=self.by_chance(dtype),
                **self._attrs,
            )
        )
        for key in self._names(name, dtype, absmax is not None):
            graph.output(key, next(made))

    def _names(self, name: str, dtype: str, eight_bit: bool) -> list[str]:
        """Where the lists of `adamw_step`'s and `adamw_bucket`'s results belong, for one parameter."""
        master = self.has_master(dtype)
        places = {
            "params": f"master.{name}" if master else name,
            "exp_avgs": f"exp_avg.{name}",
            "exp_avg_sqs": f"exp_avg_sq.{name}",
            "exp_avg_absmaxes": f"exp_avg_absmax.{name}",
            "exp_avg_sq_absmaxes": f"exp_avg_sq_absmax.{name}",
            "narrows": name,
        }
        lists = bucket_lists(eight_bit=eight_bit, narrow=dtype if master else "")
        return [places[each] for each in lists if each != "grads"]

    def _buckets(
        self,
        graph: Graph,
        parameters: Parameters,
        grads: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        rates: Mapping[str, Tensor],
        scalars: tuple[Tensor | None, ...],
    ) -> None:
        alike: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
        for site, (name, (shape, dtype)) in enumerate(parameters.items()):
            kind = (dtype, self.stored(shape, dtype), _lr_input(self.rate(name)))
            alike.setdefault(kind, []).append((site, name))
        for (dtype, stored, lr), members in alike.items():
            narrow = dtype if self.has_master(dtype) else ""
            eight_bit = stored == "uint8"
            held = {name: graph.input(name, *parameters[name]) for _, name in members}
            known = {**held, **state}
            lists = [list(each) for each in zip(*(self._names(n, dtype, eight_bit) for _, n in members), strict=True)]
            params, *rest = [[known[name] for name in each] for each in lists]
            given = [*params, *(grads[name] for _, name in members), *(tensor for each in rest for tensor in each)]
            made = iter(
                adamw_bucket(
                    *given,
                    rates[lr],
                    *scalars,
                    sites=tuple(site for site, _ in members),
                    eight_bit=eight_bit,
                    narrow=narrow,
                    stochastic=self.by_chance(dtype),
                    **self._attrs,
                )
            )
            for each in lists:
                for name in each:
                    graph.output(name, next(made))


def named(parameter: str, part: str) -> bool:
    """Whether `part` is some of the dotted parts of a parameter's name, whole and in a row: "lora_B", "layers.0"."""
    return f".{part}." in f".{parameter}."


def _lr_input(factor: float) -> str:
    return "lr" if factor == 1.0 else f"lr.{factor!r}"

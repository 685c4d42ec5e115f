"""What optimizers share: one graph from gradients to new weights and state, on the device from end to end.

    optimizer.state(parameters)                   the arrays that it keeps, by name
    optimizer.scalars(parameters, lr=..., ...)    the host's numbers of a step, by the name of their input
    optimizer.graph(parameters, exact=...)        norm, clip and update of every parameter

An optimizer says what it keeps of a parameter (`kept`) and writes its nodes (`update`). The rest is here: masters,
narrower state, rates by name, the norm and its clip. A step whose norm is not finite leaves weights and state alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from smedjan.errors import ConfigError
from smedjan.graph.node import Graph
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import cast, scale_by
from smedjan.ops.optimizer import (
    BLOCK,
    clip_coefficient,
    dequantize_blocks,
    global_norm,
    keep,
    norm_and_clip,
    quantize_blocks,
    stochastic_round,
)
from smedjan.ops.steps import average_update

Shape = tuple[int, ...]

Parameters = Mapping[str, tuple[Shape, str]]
"""Shape and dtype of each trained parameter."""

STATES = ("same", "float32", "bfloat16", "8bit")
ROUNDINGS = ("nearest", "stochastic")

EIGHT_BIT_FROM = 4096
"""Values from which a parameter's state is quantised, as in bitsandbytes: small ones are cheap, and touchy (norms)."""

COPIES = ("master", "ema")
"""Kinds of state that begin as the parameter in float32; all others begin as zeros."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update's graph as it is made: what the nodes of every parameter read.

    scalars      the host's numbers, by the name of their input
    norm         of all gradients, unclipped
    coefficient  of the clip, a scalar by which each gradient is multiplied; None where nothing is clipped
    sites        each parameter's number among all that are trained
    """

    graph: Graph
    parameters: Parameters
    exact: bool
    buckets: bool
    scalars: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    norm: Tensor
    coefficient: Tensor | None
    sites: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """`clip` is the most the global norm may be, 0: any.

    With `master`, a parameter narrower than float32 has a float32 copy that is updated in its place and rounded to it:
    a step smaller than the parameter's own rounding is not lost. Without one, `rounding="stochastic"` keeps such steps
    in the mean: the new bfloat16 parameter is rounded up or down by chance (`stochastic_round`).

    `state_dtype` is that of the moments as they are kept:
    same       that of what is updated, the master where there is one
    float32
    bfloat16   rounded to nearest, or as the optimizer says
    8bit       blocks of 256 values under a float32 scale each (`quantize_blocks`; Dettmers et al. 2022). Blocks begin
               with each parameter, so that a checkpoint holds state by name and a bucket may hold parameters in any
               order: a parameter whose size is no multiple of 256, or below `EIGHT_BIT_FROM`, has float32 state

    `rates` are factors of the learning rate for parameters of some names, the first that matches (`named`): LoRA+
    (Hayou et al. 2024) is (("lora_B", 16.0),). `factor` multiplies all of them.

    With `ema`, a decay, ema.NAME is the exponential mean of the parameter (of its master) after each step, in float32,
    which begins at the weights that a run starts from: torch's AveragedModel with get_ema_multi_avg_fn.
    """

    states: ClassVar[tuple[str, ...]] = STATES
    """What `state_dtype` may be."""

    weight_decay: float = 0.0
    clip: float = 1.0
    master: bool = False
    state_dtype: str = "same"
    rounding: str = "nearest"
    rates: tuple[tuple[str, float], ...] = ()
    factor: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        assert self.state_dtype in STATES, self.state_dtype
        assert self.rounding in ROUNDINGS, self.rounding
        if self.state_dtype not in self.states:
            raise ConfigError(
                f"{type(self).__name__} keeps no state of {self.state_dtype}",
                field="optim.state",
                remedy=f"give one of {', '.join(self.states)}",
            )

    # What an optimizer says of itself.

    @abstractmethod
    def kept(self, name: str, shape: Shape, dtype: str) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype of the arrays kept of a parameter, by kind, but for its master."""

    @abstractmethod
    def update(self, update: Update, names: Sequence[str]) -> None:
        """Appends the nodes of these parameters, and makes their new arrays the graph's outputs."""

    def scalars(self, parameters: Parameters, *, lr: float, step: int, seed: int) -> dict[str, float]:
        """The graph's inputs that the host knows: learning rates, the number of the step (counted from 1, skipped ones
        not) and, where something is rounded by chance, the seed."""
        chance = {"seed": seed} if self.seeded(parameters) else {}
        return {**self.learning_rates(lr, parameters), "step": step, **chance}

    # The rest.

    def has_master(self, dtype: str) -> bool:
        return self.master and dtype in ("bfloat16", "float16")

    def held(self, dtype: str) -> str:
        """Dtype of what is updated of a parameter: the master's where there is one."""
        return "float32" if self.has_master(dtype) else dtype

    def rate(self, name: str) -> float:
        """The factor of this parameter's learning rate."""
        return self.factor * next((factor for part, factor in self.rates if named(name, part)), 1.0)

    def learning_rates(self, lr: float, parameters: Parameters) -> dict[str, float]:
        """The inputs of the graph that are learning rates: one for each factor that a parameter has."""
        return {lr_input(factor): lr * factor for factor in dict.fromkeys(map(self.rate, parameters))}

    def stored(self, shape: Shape, dtype: str) -> str:
        """Dtype of a parameter's moments as they are kept: "uint8" are codes."""
        if self.state_dtype == "8bit":
            return "uint8" if prod(shape) % BLOCK == 0 and prod(shape) >= EIGHT_BIT_FROM else "float32"
        return self.held(dtype) if self.state_dtype == "same" else self.state_dtype

    def moments(self, shape: Shape, dtype: str, kinds: Sequence[str]) -> dict[str, tuple[Shape, str]]:
        """`kept` of moments of the parameter's shape: codes have their blocks' scales besides."""
        stored = self.stored(shape, dtype)
        made = dict.fromkeys(kinds, (shape, stored))
        if stored == "uint8":
            made |= {f"{kind}_absmax": ((prod(shape) // BLOCK,), "float32") for kind in kinds}
        return made

    def by_chance(self, dtype: str) -> bool:
        """Whether a parameter of this dtype is rounded stochastically."""
        return self.rounding == "stochastic" and dtype == "bfloat16" and not self.has_master(dtype)

    def seeded(self, parameters: Parameters) -> bool:
        """Whether the graph has an input `seed`, a host scalar."""
        return any(self.by_chance(dtype) for _, dtype in parameters.values())

    def state(self, parameters: Parameters) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype of each array that the optimizer keeps, as KIND.NAME: what it says, master and ema."""
        made: dict[str, tuple[Shape, str]] = {}
        for name, (shape, dtype) in parameters.items():
            made |= {f"{kind}.{name}": spec for kind, spec in self.kept(name, shape, dtype).items()}
            if self.has_master(dtype):
                made[f"master.{name}"] = (shape, "float32")
            if self.ema:
                made[f"ema.{name}"] = (shape, "float32")
        return made

    def state_bytes(self, parameters: Parameters) -> int:
        return sum(Spec(*kept).nbytes for kept in self.state(parameters).values())

    def graph(self, parameters: Parameters, *, exact: bool, buckets: bool = False) -> Graph:
        """Inputs NAME, grad.NAME, the state and `scalars`; the parameters and the state back, and the unclipped
        grad_norm.

        An exact backend multiplies each gradient by the coefficient first, as clip_grad_norm_ does; a fast one folds
        the coefficient into the update. With `buckets`, one op may update all parameters that are alike.
        """
        assert not (exact and buckets), "a bucket folds the coefficient"
        graph = Graph()
        scalars = {
            name: graph.input(name, (), "int64" if isinstance(value, int) else "float32")
            for name, value in self.scalars(parameters, lr=1.0, step=1, seed=0).items()
        }
        state = {name: graph.input(name, shape, dtype) for name, (shape, dtype) in self.state(parameters).items()}
        grads = {name: graph.input(f"grad.{name}", shape, dtype) for name, (shape, dtype) in parameters.items()}
        coefficient: Tensor | None
        if buckets and self.clip > 0:
            norm, coefficient = norm_and_clip(*grads.values(), max_norm=self.clip)
        else:
            norm = global_norm(*grads.values())
            coefficient = clip_coefficient(norm, max_norm=self.clip) if self.clip > 0 else None
        graph.output("grad_norm", norm)
        update = Update(
            graph=graph,
            parameters=parameters,
            exact=exact,
            buckets=buckets,
            scalars=scalars,
            state=state,
            grads=grads,
            norm=norm,
            coefficient=coefficient,
            sites={name: site for site, name in enumerate(parameters)},
        )
        self.update(update, list(parameters))
        for name in parameters if self.ema else ():
            new = graph.outputs.get(f"master.{name}", graph.outputs[name])
            graph.output(f"ema.{name}", average_update(state[f"ema.{name}"], new, norm, decay=self.ema))
        return graph

    def parameter(self, update: Update, name: str) -> Tensor:
        """What is updated: the parameter, an input, or its master."""
        shape, dtype = update.parameters[name]
        return update.state[f"master.{name}"] if self.has_master(dtype) else update.graph.input(name, shape, dtype)

    def gradient(self, update: Update, name: str) -> tuple[Tensor, Tensor | None]:
        """In the dtype of what is updated; and the coefficient by which it is to be multiplied still."""
        dtype = self.held(update.parameters[name][1])
        gradient = cast(update.grads[name], dtype)
        coefficient = None if update.coefficient is None else cast(update.coefficient, dtype)
        if update.exact and coefficient is not None:
            return scale_by(gradient, coefficient), None
        return gradient, coefficient

    def write(self, update: Update, name: str, new: Tensor) -> None:
        """The graph's outputs of a parameter from its new value, in any dtype."""
        _, dtype = update.parameters[name]
        if self.by_chance(dtype):
            step, seed = update.scalars["step"], update.scalars["seed"]
            update.graph.output(name, stochastic_round(cast(new, "float32"), step, seed, site=2 * update.sites[name]))
        else:
            if self.has_master(dtype):
                update.graph.output(f"master.{name}", new)
            update.graph.output(name, cast(new, dtype))

    def stepped(
        self, update: Update, name: str, op: Callable[..., tuple[Tensor, ...]], signed: Mapping[str, bool], **attrs: Any
    ) -> None:
        """A parameter's step by `op(param, grad, *moments, lr, norm, grad_scale, **attrs)`, which gives param and the
        moments anew, from stored state to stored state. `signed` says of each moment whether it has a sign.

        It is computed in the dtype of what is updated if the moments have it too, else in float32.
        """
        dtype = update.parameters[name][1]
        held, (gradient, coefficient) = self.parameter(update, name), self.gradient(update, name)
        old = {kind: update.state[f"{kind}.{name}"] for kind in signed}
        same = all(each.dtype == held.dtype for each in old.values()) and not self.by_chance(dtype)
        work = held.dtype if same else "float32"
        moments = [
            dequantize_blocks(each, update.state[f"{kind}_absmax.{name}"], signed=signed[kind])
            if each.dtype == "uint8"
            else cast(each, work)
            for kind, each in old.items()
        ]
        lr = update.scalars[lr_input(self.rate(name))]
        param, *made = op(cast(held, work), cast(gradient, work), *moments, lr, update.norm, coefficient, **attrs)
        self.write(update, name, param)
        for (kind, each), new in zip(old.items(), made, strict=True):
            if each.dtype != "uint8":
                update.graph.output(f"{kind}.{name}", cast(new, each.dtype))
                continue
            absmax = f"{kind}_absmax.{name}"
            codes, scales = quantize_blocks(new, signed=signed[kind])
            update.graph.output(f"{kind}.{name}", keep(codes, each, update.norm))
            update.graph.output(absmax, keep(scales, update.state[absmax], update.norm))


def named(parameter: str, part: str) -> bool:
    """Whether `part` is some of the dotted parts of a parameter's name, whole and in a row: "lora_B", "layers.0"."""
    return f".{part}." in f".{parameter}."


def lr_input(factor: float) -> str:
    """The input of the graph that is the learning rate times `factor`."""
    return "lr" if factor == 1.0 else f"lr.{factor!r}"

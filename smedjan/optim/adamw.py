"""AdamW, one parameter at a time or in buckets of those that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smedjan.graph.tensor import Tensor
from smedjan.ops.optimizer import adamw_bucket, adamw_step, bucket_lists
from smedjan.optim.base import Optimizer, Parameters, Shape, Update, lr_input


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Loshchilov & Hutter 2019, with torch.optim.AdamW's meaning of each number.

    In bfloat16 state exp_avg is rounded to nearest: it moves by 1 - beta1, a tenth of itself, a step. exp_avg_sq by
    chance: it moves by 1 - beta2, a thousandth, and half an ulp of bfloat16 is 2^-9, so that to nearest it would stand
    still at its largest value.

    The step's number t in the corrections 1 - beta^t counts the steps that were taken: one that is skipped for a norm
    that is not finite does not raise it, as under torch's GradScaler, which leaves such a step out.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def kept(self, name: str, shape: Shape, dtype: str) -> dict[str, tuple[Shape, str]]:
        return self.moments(shape, dtype, ("exp_avg", "exp_avg_sq"))

    def seeded(self, parameters: Parameters) -> bool:
        return super().seeded(parameters) or (self.state_dtype == "bfloat16" and bool(parameters))

    def update(self, update: Update, names: Sequence[str]) -> None:
        if update.buckets:
            self._buckets(update, names)
            return
        for name in names:
            self._one(update, name)

    @property
    def _attrs(self) -> dict[str, Any]:
        return {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "weight_decay": self.weight_decay}

    def _chances(self, dtype: str) -> tuple[bool, bool]:
        """Whether a parameter of this dtype, and its second moment, are rounded stochastically."""
        return self.by_chance(dtype), self.state_dtype == "bfloat16"

    def _one(self, update: Update, name: str) -> None:
        dtype, state = update.parameters[name][1], update.state
        gradient, coefficient = self.gradient(update, name)
        moments = state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"]
        absmax = None
        if moments[0].dtype == "uint8":
            absmax = state[f"exp_avg_absmax.{name}"], state[f"exp_avg_sq_absmax.{name}"]
        made = iter(
            adamw_step(
                self.parameter(update, name),
                gradient,
                *moments,
                absmax,
                update.scalars[lr_input(self.rate(name))],
                update.scalars["step"],
                update.scalars.get("seed"),
                coefficient,
                update.norm,
                site=update.sites[name],
                narrow=dtype if self.has_master(dtype) else "",
                stochastic=self._chances(dtype),
                **self._attrs,
            )
        )
        for key in self._names(name, dtype, absmax is not None):
            update.graph.output(key, next(made))

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

    def _buckets(self, update: Update, names: Sequence[str]) -> None:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for name in names:
            shape, dtype = update.parameters[name]
            alike.setdefault((dtype, self.stored(shape, dtype), lr_input(self.rate(name))), []).append(name)
        for (dtype, stored, lr), members in alike.items():
            narrow = dtype if self.has_master(dtype) else ""
            eight_bit = stored == "uint8"
            held = {name: update.graph.input(name, *update.parameters[name]) for name in members}
            known: dict[str, Tensor] = {**held, **update.state}
            lists = [list(each) for each in zip(*(self._names(n, dtype, eight_bit) for n in members), strict=True)]
            params, *rest = [[known[name] for name in each] for each in lists]
            made = iter(
                adamw_bucket(
                    *params,
                    *(update.grads[name] for name in members),
                    *(tensor for each in rest for tensor in each),
                    update.scalars[lr],
                    update.scalars["step"],
                    update.scalars.get("seed"),
                    update.coefficient,
                    update.norm,
                    sites=tuple(update.sites[name] for name in members),
                    eight_bit=eight_bit,
                    narrow=narrow,
                    stochastic=self._chances(dtype),
                    **self._attrs,
                )
            )
            for each in lists:
                for name in each:
                    update.graph.output(name, next(made))

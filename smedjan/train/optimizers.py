"""The optimizer of a run from its flags: which flag is whose, and what each has where nothing is given.

Learning rates, as factors of AdamW's:
    muon       1, with the rate matched to AdamW's (Liu et al. 2025); "original" needs a rate of its own
    lion       1/10: the paper's section 5 has a third to a tenth (Chen et al. 2023)
    adafactor  1: like AdamW's, its step has a root mean square near the rate (Shazeer & Stern 2018, section 6)
    sophia     3/10, our choice between Lion's and AdamW's: no value moves by more than the rate, most by less
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.optim.base import Optimizer
    from smedjan.train.config import OptimConfig

RATES: Mapping[str, float] = {"adamw": 1.0, "muon": 1.0, "lion": 0.1, "adafactor": 1.0, "sophia": 0.3}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "beta1": {"adamw": 0.9, "muon": 0.9, "lion": 0.9, "sophia": 0.965},
    "beta2": {"adamw": 0.999, "muon": 0.999, "lion": 0.99, "sophia": 0.99},
    "eps": {"adamw": 1e-8, "muon": 1e-8},
    "momentum": {"muon": 0.95},
    "muon_adjust": {"muon": "match_rms_adamw"},
    "rho": {"sophia": 0.04},
    "hessian_every": {"sophia": 10},
}
"""Flags that some optimizers have, with the default of each."""


def defaults(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What to take for the flags of DEFAULTS; one that the optimizer does not have is an error."""
    made = {}
    for key, of in DEFAULTS.items():
        if given[key] is not None and name not in of:
            raise ConfigError(
                f"{name} has none", field=f"optim.{key}", remedy=f"leave it out, or give --optim.name {next(iter(of))}"
            )
        made[key] = of.get(name) if given[key] is None else given[key]
    return made


def optimizer(optim: OptimConfig, lr: float, names: Sequence[str], *, apart: tuple[str, ...], ema: float) -> Optimizer:
    """The optimizer of a run of peak rate `lr` over the parameters `names`; `apart` are modules that are no hidden
    layers."""
    # Every command reads this file's defaults; none but a run needs their graphs, which take a tenth of its start
    from smedjan.optim.adafactor import Adafactor
    from smedjan.optim.adamw import AdamW
    from smedjan.optim.base import named
    from smedjan.optim.lion import Lion
    from smedjan.optim.muon import Muon
    from smedjan.optim.sophia import Sophia

    for part, _ in optim.rates:
        if not any(named(name, part) for name in names):
            raise ConfigError(
                f"no trained parameter has {part!r} in its name",
                field="optim.lr_pattern",
                remedy="give whole parts of names, such as embed_tokens, layers.0 or lora_B",
            )
    common: dict[str, Any] = {
        "weight_decay": optim.weight_decay,
        "clip": optim.clip,
        "master": optim.master,
        "state_dtype": optim.state,
        "rounding": optim.rounding,
        "rates": optim.rates,
        "ema": ema,
    }
    betas: dict[str, Any] = {"beta1": optim.beta1, "beta2": optim.beta2}
    if optim.name == "lion":
        return Lion(**common, **betas)
    if optim.name == "adafactor":
        return Adafactor(**common)
    if optim.name == "sophia":
        assert optim.rho is not None
        assert optim.hessian_every is not None
        return Sophia(**common, **betas, rho=optim.rho, every=optim.hessian_every)
    betas["eps"] = optim.eps
    if optim.name == "muon":
        assert optim.momentum is not None
        assert optim.muon_adjust is not None
        share = 1.0 if optim.adamw_lr is None else optim.adamw_lr / lr
        given: dict[str, Any] = {
            "momentum": optim.momentum,
            "adjust": optim.muon_adjust,
            "adamw_rate": share,
            "apart": apart,
        }
        return Muon(**common, **betas, **given)
    return AdamW(**common, **betas)

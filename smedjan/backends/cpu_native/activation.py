"""Activations that torch has as one call and transformers writes as several."""

from __future__ import annotations

from smedjan.backends.cpu_native.glu import ACTIVATIONS, SLOPES
from smedjan.backends.cpu_native.table import RULES

for name in ("gelu_new", "relu2"):
    RULES.rule(name, label="cpu_native fused activation")(ACTIVATIONS[name])
    RULES.rule(f"{name}_bwd", label="cpu_native fused activation")(SLOPES[name])

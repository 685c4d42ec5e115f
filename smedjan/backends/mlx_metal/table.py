"""The MLX backend's rule table. Modules of this package fill it; `smedjan.backends.mlx_metal` loads them all."""

from __future__ import annotations

from smedjan.graph.lowering import RuleTable

RULES = RuleTable("mlx_metal")

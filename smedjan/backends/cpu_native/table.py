"""The rule table of `cpu_native`; ops without a fused form here are single aten calls of the exact backend."""

from __future__ import annotations

from smedjan.backends.torch_reference.table import RULES as ATEN
from smedjan.graph.lowering import RuleTable

RULES = RuleTable("cpu_native", parent=ATEN)

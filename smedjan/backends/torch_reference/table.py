"""The exact backend's rule table. The modules of this package fill it; the package loads them all."""

from __future__ import annotations

from smedjan.graph.lowering import RuleTable

RULES = RuleTable("aten")

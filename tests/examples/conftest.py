"""The example's modules are scripts beside each other: importable from here as `task`, `baselines`, ..."""

from __future__ import annotations

import sys
from pathlib import Path

SPDX = Path(__file__).parents[2] / "examples" / "spdx"
sys.path.insert(0, str(SPDX))

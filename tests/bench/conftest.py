"""Without mlx-lm there is nothing to collect here."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mlx_lm") is not None else ["test_*.py"]

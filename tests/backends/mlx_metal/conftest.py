"""Without MLX there is nothing to collect here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("mlx") is not None else ["test_*.py"]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Metal kernels are the rules, and run from their source."""
    from metal_emulator import Emulator

    from smedjan.backends.mlx_metal.kernels import common

    emulator = Emulator()
    monkeypatch.setattr(common, "DEVICE", emulator)
    return emulator

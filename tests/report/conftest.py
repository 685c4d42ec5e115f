"""A run directory with every section of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from .sample import EVALS, FILES, LOG, log_text, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path, log_text([*LOG, *EVALS]), FILES)

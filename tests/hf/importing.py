"""What the tests of import share: loading what was written, and the error after which nothing is there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smedjan.errors import SmedjanError
from smedjan.hf.import_model import import_model


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load(directory: Path) -> LlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


def refused(source: Path, out: Path, **options: Any) -> SmedjanError:
    """The error of an import, after which nothing is there."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(SmedjanError) as caught:
        import_model(source, out, **options)
    assert sorted(path.name for path in out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return caught.value

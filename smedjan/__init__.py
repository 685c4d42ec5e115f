"""smedjan: the trainer with which one person owns a language model.

`import smedjan` is cheap: torch, triton, mlx and transformers are imported when something needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from smedjan.errors import SmedjanError

if TYPE_CHECKING:
    from smedjan.api import FinetuneConfig, finetune, import_model, load, merge, parity, plan

__version__ = "0.1.0"
_LAZY = ("FinetuneConfig", "finetune", "import_model", "load", "merge", "parity", "plan")
__all__ = [
    "FinetuneConfig",
    "SmedjanError",
    "finetune",
    "import_model",
    "load",
    "merge",
    "parity",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module("smedjan.api"), name)
    raise AttributeError(f"module 'smedjan' has no attribute {name!r}")

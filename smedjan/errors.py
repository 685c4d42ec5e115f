"""Errors that a user can cause.

Each is one line that names the file, the field, what was found and the remedy. The command line prints `str(error)` and
exits with code 2; everything else that escapes is a defect of ours (code 1).
"""

from __future__ import annotations

from difflib import get_close_matches
from os import PathLike


class SmedjanError(Exception):
    """What the user gave is wrong. `file`, `field` and `remedy` are machine-readable; `str()` is one line."""

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.field = field
        self.remedy = remedy
        super().__init__(message)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.field) if part)
        text = f"{where}: {self.message}" if where else self.message
        if self.remedy:
            text = f"{text}; {self.remedy}"
        return " ".join(text.split())


class ConfigError(SmedjanError):
    """A `config.json`, TOML file or flag that is missing, unknown, out of range or contradicts another."""


class CheckpointError(SmedjanError):
    """Weights that are truncated, mislabelled, missing, extra, of the wrong shape or not finite."""


class TokenizerError(SmedjanError):
    """A tokenizer or chat template that cannot be read, or that does not fit the model."""


class DataError(SmedjanError):
    """A training or evaluation row that cannot be read, masked or fitted."""


class BackendError(SmedjanError):
    """A backend that is not installed, or that has no lowering for an op of this model."""


class ShapeError(SmedjanError):
    """Tensors whose shapes or dtypes an op does not accept."""


class Elsewhere(SmedjanError):
    """What stopped another process of the same run, which reports it: here there is nothing more to say."""


def nearest(name: str, known: list[str] | tuple[str, ...] | set[str]) -> str | None:
    """The known name closest to a misspelt one, or None: for `did you mean ...?` remedies."""
    found = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return found[0] if found else None

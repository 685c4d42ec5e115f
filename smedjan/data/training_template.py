"""Generation marks for chat templates that lack them: `templates/NAME_training.jinja` renders what `NAME.jinja`, the
template that the models ship, renders, and says which of it the assistant does.

Where it is needed: Qwen3 renders earlier turns without their reasoning and Phi-3 ends every conversation with EOS, so
that no conversation begins with the one before it. Elsewhere it saves rendering each turn anew. TRL ships such
templates too; its Qwen3 renders another text than the model's, ours do not.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
_MARKED = "_training"


@lru_cache(maxsize=1)
def known() -> dict[str, str]:
    """The templates that models ship to those with marks."""
    files = sorted(file for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith(_MARKED))
    return {_read(file): _read(file.with_stem(file.stem + _MARKED)) for file in files}


def training_template(template: str) -> str | None:
    """The template with marks for one that equals a known one byte for byte."""
    return known().get(template)


def _read(file: Path) -> str:
    # Not read_text, which would turn \r\n into \n
    return file.read_bytes().decode()

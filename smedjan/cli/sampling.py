"""The flags that say how text is made: the same for `generate`, `chat` and `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.generate import Sampling


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Knobs:
    """`sampling()` checks their ranges."""

    max_new_tokens: Annotated[int | None, Parameter(help="most tokens to make (default: see above)")] = None
    temperature: Annotated[float, Parameter(help="0: always the likeliest token")] = 0.0
    top_k: Annotated[int | None, Parameter(help="keep the k likeliest tokens")] = None
    top_p: Annotated[float | None, Parameter(help="keep the likeliest tokens of this much probability")] = None
    min_p: Annotated[float | None, Parameter(help="keep tokens at least this share as likely as the first")] = None
    repetition_penalty: Annotated[float | None, Parameter(help="above 1: discourage tokens seen before")] = None
    seed: Annotated[int, Parameter(help="of what is drawn")] = 0
    stop: Annotated[
        tuple[str, ...], Parameter(negative=(), show_default=False, help="end before this text; may be given again")
    ] = ()

    def sampling(self) -> Sampling:
        from smedjan.generate import Sampling

        if not all(self.stop):
            raise ConfigError("is empty", field="stop", remedy="give the text to end before, or leave it out")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"is {self.max_new_tokens}", field="max_new_tokens", remedy="give 1 or more")
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


KNOBS = Knobs()

"""A conversation with a model: its chat template, its stop tokens, and a cache that is kept between turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.errors import ConfigError
from smedjan.generate.loop import CAPACITY_STEP
from smedjan.generate.sampling import Sampling, choose
from smedjan.generate.text import TextStream
from smedjan.hf.tokenizer import Tokenizer
from smedjan.runtime.session import Cache, Session

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An answer. `cached_tokens` of its `prompt_tokens` were computed in turns before."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "interrupted"]
    prompt_tokens: int
    cached_tokens: int
    tokens_per_s: float


class Chat:
    """`messages` is the conversation so far, without `system`, which stands before it and may be changed at any time.

    The whole conversation is rendered for every turn. What of it is in the cache already, as the same tokens from the
    start, is not computed again: all of the last turn where the template only adds to it.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
    ) -> None:
        tokenizer.template_for()  # raises where there is none
        self.session, self.tokenizer, self.sampling = session, tokenizer, sampling
        self.max_new_tokens, self.stop, self.system = max_new_tokens, tuple(stop), system
        self.stop_ids = {*tokenizer.eos_token_ids, *session.config.eos_token_id, *template_stops(tokenizer)}
        self.messages: list[Message] = []
        self._cache: Cache | None = None
        self._fed: list[int] = []
        self._draws = 0

    def reset(self) -> None:
        """Forgets the conversation, but not the system prompt."""
        self.messages = []

    def conversation(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def say(
        self,
        text: str,
        *,
        show: Callable[[str], None] = lambda _: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """The answer to `text`, shown piece by piece. Once `interrupted`, it ends, and what there is of it is kept.

        Raises ConfigError, and keeps the conversation as it was, where that leaves no room for an answer.
        """
        asked = [*self.conversation(), {"role": "user", "content": text}]
        rendered, _ = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        ids, context = self.tokenizer.encode(rendered, False), self.session.config.max_position_embeddings
        if len(ids) >= context:
            raise ConfigError(
                f"the conversation is {len(ids)} tokens long, and the context ends at {context}",
                field="messages",
                remedy="begin a new one (/reset), or say less",
            )
        began, cached = time.perf_counter(), self._rewind(ids)
        seen, fresh = list(ids), ids[cached:]
        stream, reason = TextStream(self.tokenizer.decode, self.stop), "length"
        for _ in range(min(self.max_new_tokens or context, context - len(ids))):
            token = choose(self._feed(fresh), seen, self.sampling, self._draws)
            self._draws += 1
            seen.append(token)
            if token not in self.stop_ids:
                show(stream.push(token))
            if token in self.stop_ids or stream.stopped:
                reason = "stop"
                break
            if interrupted():
                reason = "interrupted"
                break
            fresh = [token]
        show(stream.finish())
        seconds, made = time.perf_counter() - began, tuple(seen[len(ids) :])
        self.messages += [asked[-1], {"role": "assistant", "content": stream.text}]
        return Turn(
            text=stream.text,
            token_ids=made,
            finish_reason=reason,  # type: ignore[arg-type]
            prompt_tokens=len(ids),
            cached_tokens=cached,
            tokens_per_s=len(made) / seconds,
        )

    def _rewind(self, ids: Sequence[int]) -> int:
        """Keeps of the cache what `ids` begin with, but for their last token, whose logits are wanted; how many."""
        same = 0
        for old, new in zip(self._fed, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        restart = self.session.config.restart_after
        if restart is not None and same <= restart < len(self._fed):
            same = 0  # what is cached was turned by the frequencies of longer texts
        if self._cache is not None:
            self._cache.length = same
        self._fed = self._fed[:same]
        return same

    def _feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [V] behind `tokens`; into a larger cache, from the start, where they do not fit."""
        end, config = len(self._fed) + len(tokens), self.session.config
        crosses = config.restart_after is not None and 0 < len(self._fed) <= config.restart_after < end
        if self._cache is None or end > self._cache.capacity or crosses:
            tokens, self._fed = [*self._fed, *tokens], []
            # Twice what is needed, so that a long conversation is computed anew a few times at most.
            wanted = min(2 * end, config.max_position_embeddings)
            self._cache = Cache(self.session, batch=1, capacity=-(-wanted // CAPACITY_STEP) * CAPACITY_STEP)
        raw = self.session.backend.to_raw(self._cache.feed(np.asarray([tokens]), last=True))
        self._fed += tokens
        return to_float32(raw).reshape(-1, raw.shape[-1])[-1]


def template_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token that the chat template writes behind an answer, if it does: models are trained to end with it,
    whatever generation_config.json says."""
    if tokenizer.chat_template is None:
        return ()
    mark = "Answer."
    messages = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": mark}]
    text, _ = tokenizer.apply_chat_template(messages)
    behind = tokenizer.encode(text.rpartition(mark)[2], add_special_tokens=False)[:1]
    added = tokenizer.backend.get_added_tokens_decoder()
    return tuple(token for token in behind if token in added and added[token].special)

"""Tokens to text as they come, and stop strings found in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a character of several tokens decodes to until its last one is there."""


class TextStream:
    """The text of tokens that come one by one, in pieces that never change afterwards.

    The pieces' sum is `decode` of all tokens, up to the first stop string. A piece is what a token adds to the decoded
    text of the ones shortly before it (the cost of a token does not grow with the text), held back while its last
    character is unfinished, or while a stop string may have begun.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string"
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        # tokens [_from, _read) are decoded once more with the new ones: what a token looks like hangs on its neighbours
        self._from = self._read = 0
        self._held = ""
        self.text = ""
        """What was given out."""
        self.stopped = False
        """Whether a stop string was met. It, and what comes behind it, is not given out."""

    def push(self, token: int) -> str:
        """The text that is sure now, maybe none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before, both = self._decode(self._tokens[self._from : self._read]), self._decode(self._tokens[self._from :])
        if len(both) <= len(before) or both.endswith(UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._give(both[len(before) :], last=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        before, both = self._decode(self._tokens[self._from : self._read]), self._decode(self._tokens[self._from :])
        self._from = self._read = len(self._tokens)
        return self._give(both[len(before) :], last=True)

    def _give(self, fresh: str, *, last: bool) -> str:
        text = self._held + fresh
        met = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        keep = min(met, default=len(text))
        self.stopped = bool(met)
        if not met and not last:
            keep -= max((self._begun(text, stop) for stop in self._stop), default=0)
        text, self._held = text[:keep], "" if met else text[keep:]
        self.text += text
        return text

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """The length of the longest end of `text` with which `stop` begins."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)

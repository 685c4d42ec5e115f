"""What the processes of one data-parallel run do together: they tell one another things, and sum their gradients.

Each process holds the whole model and takes some micro-batches of every step. What one of them cannot go on from stops
them all, at their next exchange: a disk that is full for process 0 is no reason for the others to wait forever.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from smedjan.errors import BackendError, Elsewhere, SmedjanError

Array = Any
Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each array: a process without a micro-batch has none to look at."""


class Lost(BackendError):
    """Another process is gone, or does not answer."""


class Collective(ABC):
    """`rank` of `world` processes. All of them make the same calls in the same order."""

    rank: int
    world: int

    def exchange(self, value: Any = None) -> list[Any]:
        """What each process gives (JSON; numbers keep their bits), by rank. Waits for all of them."""
        said = [json.loads(each) for each in self.gather(json.dumps({"value": value}).encode())]
        self._stop_for(said)
        return [each["value"] for each in said]

    def fail(self, error: SmedjanError) -> None:
        """Stops all processes for an error of this one. Where several have one, the lowest rank's is the one to report:
        returns there, and raises `Elsewhere` in the others."""
        try:
            said = [json.loads(each) for each in self.gather(json.dumps({"error": str(error)}).encode())]
        except Lost:
            return
        self._stop_for(said)

    def _stop_for(self, said: list[Any]) -> None:
        first = next((rank for rank, each in enumerate(said) if "error" in each), self.rank)
        if first != self.rank:
            raise Elsewhere(f"process {first}: {said[first]['error']}")

    @abstractmethod
    def gather(self, message: bytes) -> list[bytes]:
        """Every process's message, by rank."""

    @abstractmethod
    def sum(self, totals: Mapping[str, Array] | None, specs: Specs) -> Mapping[str, Array]:
        """The sum over the processes, of float32 and in an order of the library's; None adds nothing. All get the same
        bits."""

    @abstractmethod
    def add(
        self, totals: Mapping[str, Array] | None, grads: Mapping[str, Array] | None, specs: Specs, parts: int
    ) -> dict[str, Array]:
        """totals + grads of process 0 + ... + grads of process `parts` - 1, in this order and in the arrays' own dtype:
        the additions that one process makes which has these micro-batches one after another."""

    @abstractmethod
    def close(self) -> None:
        """Ends what this process holds of the group."""


class Alone(Collective):
    """The one process of an ordinary run."""

    rank, world = 0, 1

    def gather(self, message: bytes) -> list[bytes]:
        return [message]

    def sum(self, totals: Mapping[str, Array] | None, specs: Specs) -> Mapping[str, Array]:
        assert totals is not None
        return totals

    def add(
        self, totals: Mapping[str, Array] | None, grads: Mapping[str, Array] | None, specs: Specs, parts: int
    ) -> dict[str, Array]:
        raise AssertionError("one process adds in its own programs")

    def close(self) -> None:
        pass

"""Memory that the programs of one session share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor as Array


class User(Protocol):
    """A program that is bound to the arena."""

    def unbind(self) -> None: ...


@dataclass
class Pool:
    """Memory that the programs of one session share: an arena, since one program runs at a time, and the outputs.

    memory  bytes that a program may take, None: any
    """

    device: torch.device
    memory: int | None = None
    arena: Array | None = None
    outputs: dict[tuple[str, tuple[int, ...], torch.dtype], Array] = field(default_factory=dict)
    allocations: int = 0
    """How often memory was asked for: it stops rising when every program of a run has run."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Array:
        self.allocations += 1
        return torch.zeros(shape, dtype=dtype, device=device or self.device)

    users: WeakSet[User] = field(default_factory=WeakSet)

    def arena_of(self, size: int) -> Array:
        """At least `size` bytes. Programs bound to a smaller arena let go of it and bind anew."""
        if self.arena is None or self.arena.numel() < size:
            for user in list(self.users):
                user.unbind()
            self.users.clear()
            self.arena = None  # two are never there at once
            self.arena = self.allocate((size,), torch.uint8)
        return self.arena

    def host(self, size: int, dtype: torch.dtype) -> Array:
        """A buffer of the host, pinned where there is a device to reach it."""
        self.allocations += 1
        return torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")

    def output(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
        key = (name, shape, dtype)
        if key not in self.outputs:
            self.outputs[key] = self.allocate(shape, dtype)
        return self.outputs[key]

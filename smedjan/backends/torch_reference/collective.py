"""torch.distributed: gloo between processes on CPUs, NCCL between GPUs, and gloo for what hosts tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from smedjan.backends.collective import Collective, Lost, Specs
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.errors import ConfigError

BUCKET = 8 << 20
"""Values of one transfer: few of them, and little memory beside the gradients."""

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, torch's own default: a checkpoint or an evaluation may take a while."""


class TorchCollective(Collective):
    """The default group of torch.distributed, made from the environment (`env://`) unless it is there already."""

    def __init__(self, device: str, *, rank: int, world: int) -> None:
        if not dist.is_available():
            raise ConfigError(
                "this torch has no torch.distributed",
                field="WORLD_SIZE",
                remedy="install another, or start one process",
            )
        self.rank, self.world, self.device = rank, world, device
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        self._made = not dist.is_initialized()
        if not self._made:
            return
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
        except (ValueError, RuntimeError) as cause:
            raise ConfigError(
                f"the processes do not find one another: {cause}",
                field="MASTER_ADDR",
                remedy="start them by torchrun or accelerate launch",
            ) from cause

    def gather(self, message: bytes) -> list[bytes]:
        with _lost():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(lengths, torch.tensor([len(message)]))
            longest = max(int(length) for length in lengths)
            ours = torch.frombuffer(bytearray(message.ljust(longest)), dtype=torch.uint8)
            theirs = [torch.empty_like(ours) for _ in range(self.world)]
            dist.all_gather(theirs, ours)
        return [bytes(each.numpy()[: int(length)]) for each, length in zip(theirs, lengths, strict=True)]

    def sum(self, totals: Mapping[str, torch.Tensor] | None, specs: Specs) -> Mapping[str, torch.Tensor]:
        if totals is None:
            made = self._empty(specs)
            for array in made.values():
                array.zero_()
        else:
            made = {name: array.contiguous() for name, array in totals.items()}
        with _lost():
            for parts in pieces(made.values(), BUCKET):
                flat = torch.cat([part.float() for part in parts])
                dist.all_reduce(flat)
                for part, piece in zip(parts, flat.split([len(part) for part in parts]), strict=True):
                    part.copy_(piece)
        return made

    def add(
        self,
        totals: Mapping[str, torch.Tensor] | None,
        grads: Mapping[str, torch.Tensor] | None,
        specs: Specs,
        parts: int,
    ) -> dict[str, torch.Tensor]:
        """Gathers whole gradients and adds them: `world` times the traffic of a reduction, for an order of ours."""
        made = self._empty(specs) if totals is None else dict(totals)
        ours = self._empty(specs) if grads is None else {name: array.contiguous() for name, array in grads.items()}
        for dtype in dict.fromkeys(dtype for _, dtype in specs.values()):
            names = [name for name, (_, other) in specs.items() if other == dtype]
            sums = pieces((made[name] for name in names), BUCKET)
            for sent, summed in zip(pieces((ours[name] for name in names), BUCKET), sums, strict=True):
                flat = torch.cat(sent)
                gathered = [torch.empty_like(flat) for _ in range(self.world)]
                with _lost():
                    # As bytes: nothing is computed on the way, and not every library knows every dtype
                    dist.all_gather([each.view(torch.uint8) for each in gathered], flat.view(torch.uint8))
                sizes = [len(part) for part in summed]
                for rank, each in enumerate(gathered[:parts]):
                    for total, piece in zip(summed, each.split(sizes), strict=True):
                        if rank == 0 and totals is None:
                            total.copy_(piece)
                        else:
                            total.add_(piece)
        return made

    def _empty(self, specs: Specs) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(shape, dtype=DTYPES[dtype], device=self.device) for name, (shape, dtype) in specs.items()
        }

    def close(self) -> None:
        if self._made:
            dist.destroy_process_group()


def pieces(arrays: Iterable[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Flat views of contiguous arrays in their order, cut where a list would hold more than `most` values."""
    held: list[torch.Tensor] = []
    room = most
    for array in arrays:
        flat = array.view(-1)
        while len(flat):
            part, flat = flat[:room], flat[room:]
            held.append(part)
            room -= len(part)
            if room == 0:
                yield held
                held, room = [], most
    if held:
        yield held


@contextmanager
def _lost() -> Iterator[None]:
    """What torch.distributed raises when a process is gone, as one line."""
    try:
        yield
    except RuntimeError as cause:
        raise Lost(
            f"another process of the run ended, or did not answer for {TIMEOUT.total_seconds():g} s",
            remedy="see what it said, and go on from the last checkpoint with --resume",
        ) from cause

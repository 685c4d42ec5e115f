"""Arrays that lie one behind another, so that one launch takes them for one: stacked weights, flat buckets.

An array is moved by giving the tensor that everybody holds another storage (`Tensor.data`): names and holders stay as
they are. Whoever has bound its address binds anew (`program` looks). Meta arrays have no address: they get a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from weakref import ref

import torch
from torch import Tensor

from smedjan.errors import BackendError

STACK = "_smedjan_stack"
"""The attribute of a stacked tensor that leads to all of its stack, without keeping it."""

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]

Movable = Callable[[Tensor], bool]
"""Whether everybody who reads or writes a tensor's values holds this very tensor: only then it can be moved."""


def always(tensor: Tensor) -> bool:
    return True


def follow(first: Tensor, second: Tensor) -> bool:
    """Whether `second` begins where `first` ends, in one storage."""
    return (
        first.dtype == second.dtype
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.data_ptr() + first.nbytes == second.data_ptr()
    )


def one_behind_another(tensors: Sequence[Tensor], allocate: Allocate, movable: Movable = always) -> Tensor:
    """The tensors' values as one flat array, whose parts they become. Contiguous arrays of one dtype."""
    first = tensors[0]
    total = sum(tensor.numel() for tensor in tensors)
    assert all(tensor.is_contiguous() and tensor.dtype == first.dtype for tensor in tensors)
    if first.device.type == "meta":
        return torch.empty(total, dtype=first.dtype, device="meta")
    if all(follow(one, other) for one, other in pairwise(tensors)):
        return first.as_strided((total,), (1,))
    assert all(map(movable, tensors)), "a place in the arena, or a part of an array, cannot be moved"
    flat = allocate((total,), first.dtype, first.device)
    start = 0
    for tensor in tensors:
        part = flat[start : start + tensor.numel()]
        part.copy_(tensor.reshape(-1))
        tensor.data = part.view(tensor.shape)
        start += tensor.numel()
    return flat


def stacked(tensors: Sequence[Tensor], allocate: Allocate, movable: Movable = always) -> Tensor:
    """[O_i, ...] each, equal but for the first dim -> [sum of O_i, ...]"""
    rest = tensors[0].shape[1:]
    assert all(tensor.shape[1:] == rest for tensor in tensors), f"{[list(tensor.shape) for tensor in tensors]}"
    for tensor in tensors:
        setattr(tensor, STACK, tuple(map(ref, tensors)))
    return one_behind_another(tensors, allocate, movable).view(-1, *rest)


def flat(lists: Sequence[Sequence[Tensor]], allocate: Allocate, movable: Movable = always) -> tuple[Tensor, ...]:
    """Each list as one flat array, all in one order. What follows in the first list goes on doing so.

    What is stacked belongs into one bucket: apart, each of the two would take it from the other in every step.
    """
    for tensors in lists:
        members = {id(tensor) for tensor in tensors}
        stacks = (member() for tensor in tensors for member in getattr(tensor, STACK, ()))
        if any(other is not None and id(other) not in members for other in stacks):
            raise BackendError(
                "weights that one product takes together would be updated by two launches",
                field="optim",
                remedy="give q, k and v of a layer one learning rate and one kind of state, and so gate and up",
            )
    order = _order(lists[0])
    return tuple(one_behind_another([tensors[index] for index in order], allocate, movable) for tensors in lists)


def _order(tensors: Sequence[Tensor]) -> list[int]:
    if tensors[0].device.type == "meta":
        return list(range(len(tensors)))
    starts = {tensor.data_ptr(): index for index, tensor in enumerate(tensors) if tensor.numel()}
    behind = {}
    for index, tensor in enumerate(tensors):
        other = starts.get(tensor.data_ptr() + tensor.nbytes)
        if tensor.numel() and other is not None and follow(tensor, tensors[other]):
            behind[index] = other
    order: list[int] = []
    followers = set(behind.values())
    for index in range(len(tensors)):
        at: int | None = index if index not in followers else None
        while at is not None:
            order.append(at)
            at = behind.get(at)
    return order

"""A computation of torch, seen aten call by aten call: what both sides of a bisection are recorded with.

A value is known by its bytes in C order, its dtype and its number of elements, never by its shape: a view and a copy of
the same elements in the same order are one value. So are 0 and -0: which of them a sum of masked terms gives depends on
the order of summands that are all nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Key = tuple[str, int, bytes]
"""(dtype, elements, digest of the bytes)"""

_COPIES = frozenset(
    (
        *("_reshape_alias", "_unsafe_view", "alias", "cat", "clone", "constant_pad_nd", "copy_", "detach"),
        *("index_select", "lift_fresh", "new_empty_strided", "new_zeros", "select_backward", "slice_backward"),
        "stack",
    )
)
"""Beside the views: aten calls whose results hold elements of their operands, or zeros, and nothing computed."""

NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Call:
    """One tensor that one aten call made. `module` is the name of transformers' module that was running."""

    op: str
    moves: bool
    tensor: torch.Tensor
    module: str

    @property
    def kind(self) -> tuple[str, int]:
        """(dtype, elements)"""
        return str(self.tensor.dtype), self.tensor.numel()

    @property
    def key(self) -> Key:
        return key(self.tensor)


class Trace(TorchDispatchMode):
    """`with Trace(see):` hands every tensor that torch makes to `see`, in order, those of autograd included."""

    def __init__(self, see: Callable[[Call], None]) -> None:
        super().__init__()
        self.see = see
        self.modules: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        moves = func.is_view or name in _COPIES
        module = self.modules[-1] if self.modules else ""
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.see(Call(f"aten.{name}", moves, leaf, module))
        return made


@contextmanager
def tracing(model: torch.nn.Module, see: Callable[[Call], None]) -> Iterator[Trace]:
    """A Trace that knows which of the model's modules runs."""
    trace, hooks = Trace(see), []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: trace.modules.append(name)

    def leave(*_: Any) -> None:
        trace.modules.pop()

    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with trace:
            yield trace
    finally:
        for hook in hooks:
            hook.remove()


def key(tensor: torch.Tensor) -> Key:
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_floating_point():
        flat = flat + 0.0
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return str(flat.dtype), flat.numel(), hashlib.blake2b(data, digest_size=16).digest()


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The distinct bit patterns of the elements, sorted: what two layouts of one table share."""
    flat = tensor.detach().contiguous().reshape(-1)
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[flat.element_size()]
    return np.unique(flat.view(torch.uint8).numpy().view(width))


def float32(tensor: torch.Tensor) -> np.ndarray:
    """The elements as a flat float32 array; bfloat16 is widened, no bit lost."""
    return tensor.detach().contiguous().reshape(-1).float().numpy()


class Wide(TorchFunctionMode):
    """`with Wide():` no operand is narrowed: a cast to a narrower float, `.float()`, or a dtype= argument is float64.

    transformers computes norms, rotary tables, softmax and the loss in float32 whatever its weights are; a float64
    reference must not. This holds for every family, since it changes what the casts mean and not who makes them.
    """

    _METHODS = frozenset((torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half))

    def __enter__(self) -> Wide:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._METHODS:
            return args[0].double()
        args = tuple(_widened(value) for value in args)
        return func(*args, **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value

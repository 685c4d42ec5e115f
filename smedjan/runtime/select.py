"""Backends by name, imported only when chosen."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from smedjan.backends.base import Backend
from smedjan.errors import BackendError, nearest

NEEDS = {
    "torch_reference": "torch",
    "cpu_native": "torch",
    "cuda_triton": "triton",
    "mlx_metal": "mlx",
}
INSTALL = {
    "torch": "pip install torch",
    "triton": "pip install 'smedjan[cuda]'",
    "mlx": "pip install 'smedjan[mlx]'",
}
_made: dict[str, Backend] = {}


def backend(name: str = "auto") -> Backend:
    """The backend called `name`; "auto" is this machine's fast one. A missing package is an error, never a fallback."""
    chosen = _automatic() if name == "auto" else name
    if chosen not in NEEDS:
        close = nearest(chosen, set(NEEDS))
        raise BackendError(
            f"unknown backend {chosen!r}",
            field="backend",
            remedy=f"{f'did you mean {close}? ' if close else ''}choose one of auto, {', '.join(NEEDS)}",
        )
    if chosen not in _made:
        package = NEEDS[chosen]
        if find_spec(package) is None:
            raise BackendError(f"{chosen} needs the package {package}", field="backend", remedy=INSTALL[package])
        _made[chosen] = import_module(f"smedjan.backends.{chosen}").backend()
    return _made[chosen]


def automatic(*, mlx: bool, gpu: bool) -> tuple[str, str]:
    """(backend, why) of a machine: `mlx` is installed on a Mac, or triton is and torch sees an NVIDIA `gpu`."""
    if mlx:
        return "mlx_metal", "MLX is installed on this Mac"
    if gpu:
        return "cuda_triton", "torch sees an NVIDIA GPU, and triton is installed"
    return "cpu_native", "there is no NVIDIA GPU with triton, and no Mac with MLX"


def _automatic() -> str:
    import platform

    mlx = platform.system() == "Darwin" and find_spec("mlx") is not None
    gpu = False
    if not mlx and find_spec("triton") is not None and find_spec("torch") is not None:
        import_module("smedjan.backends.torch_reference")
        gpu = import_module("torch").cuda.is_available()
    return automatic(mlx=mlx, gpu=gpu)[0]

"""How fast the steps are: tokens/s, the share of the machine's peak, the time left. By clocks that only go forward."""

from __future__ import annotations

import time
from collections import deque

from smedjan.backends.base import Backend
from smedjan.runtime.session import Session
from smedjan.train.log import Event

WINDOW = 50
"""Steps whose mean says how long one takes, with the evaluations and checkpoints between them."""


class Meter:
    """Made before the weights are there: measures the peak of the machine and starts that of the memory anew.

    peak_flops      of the backend's matrix products of `dtype`, None: unknown
    baseline_bytes  memory of the process, or of the device, before the model
    available_bytes what the run may take from there on: `memory`, or what the device has; None: unknown
    """

    def __init__(self, backend: Backend, dtype: str, memory: int | None = None) -> None:
        self.available_bytes = backend.memory_available() if memory is None else memory
        self.peak_flops = backend.peak_flops(dtype)
        backend.reset_peak_memory()
        self.baseline_bytes = backend.peak_memory()
        self._ticks: deque[float] = deque(maxlen=WINDOW + 1)
        self._began, self._flops = 0.0, 0

    def start(self, session: Session) -> None:
        """Before a step."""
        self._began, self._flops = time.perf_counter(), session.flops
        if not self._ticks:
            self._ticks.append(self._began)

    def stop(self, session: Session, *, tokens: int, left: int) -> Event:
        """After it. MFU = FLOPs of the graphs that ran / seconds / peak (Chowdhery et al. 2022, "PaLM", appendix B)."""
        now = time.perf_counter()
        self._ticks.append(now)
        seconds = max(now - self._began, 1e-9)  # a clock may be coarser than a step
        mfu = None
        if self.peak_flops:
            reached = (session.flops - self._flops) / seconds
            # A machine that was busy when its peak was measured: what a step reached, it has.
            self.peak_flops = max(self.peak_flops, reached)
            mfu = reached / self.peak_flops
        a_step = (now - self._ticks[0]) / (len(self._ticks) - 1)
        return {"tokens_per_s": tokens / seconds, "mfu": mfu, "eta_s": left * a_step}

"""The rule table of this backend, and the libraries that it calls besides its kernels."""

from __future__ import annotations

from smedjan.backends.planned.table import PlannedRules

LIBRARIES = ("cublas", "cudnn", "aten attention", "memset", "memcpy")
"""What may run besides Triton kernels: matrix products, attention where a library's is the best there is, and the
driver's own fills and copies."""

RULES = PlannedRules("cuda_triton")

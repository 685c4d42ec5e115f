"""Values that wait on the host: copies, since the host is the device."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES

RULES.rule("to_host")(torch.clone)
RULES.rule("from_host")(torch.clone)

"""Decoding: one sequence, token by token, over the key/value cache."""

from smedjan.generate.loop import generate
from smedjan.generate.sampling import Sampling

__all__ = ["Sampling", "generate"]

"""Decoding over the key/value cache: one sequence token by token, many at once, a conversation."""

from smedjan.generate.batch import generate_many
from smedjan.generate.chat import Chat
from smedjan.generate.loop import generate
from smedjan.generate.sampling import Sampling
from smedjan.generate.text import TextStream

__all__ = ["Chat", "Sampling", "TextStream", "generate", "generate_many"]

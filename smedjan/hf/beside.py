"""What lies beside a model's weights, checked before it is copied: rights, `generation_config.json`, the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.models.config import ConfigReader, read_json_object

GENERATION = "generation_config.json"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the file system while `path` is read or looked at, as one line for the user."""
    try:
        yield
    except OSError as cause:
        raise CheckpointError(
            f"cannot be read: {cause.strerror or cause}", file=path, remedy="check the path and its rights"
        ) from cause


def require_readable(folder: Path) -> None:
    """A CheckpointError where the names in `folder`, or the files under them, are not ours to see.

    Without the first right every pattern finds nothing, as if there were no licence and no shard.
    """
    with reading(folder):
        os.listdir(folder)
        # A Path would drop the dot.
        os.stat(os.path.join(folder, "."))


def check_generation_config(folder: Path) -> None:
    """Token ids that generation would stop at, begin or pad with are ids; the rest is between its writer and reader."""
    file = folder / GENERATION
    if not file.is_file():
        return
    data = read_json_object(file)
    reader = ConfigReader(data, file)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = data.get(name)
        if name == "eos_token_id" and isinstance(value, list):
            for item in value:
                ConfigReader({name: item}, file).integer(name)
        elif value is not None:
            reader.integer(name)


def check_tokenizer(folder: Path, vocab_size: int) -> list[str]:
    """Notes on the tokenizer; one that cannot be read is an error."""
    if not (folder / "tokenizer.json").is_file():
        return ["there is no tokenizer.json: text cannot be encoded before one is added"]
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > vocab_size:
        return [f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size} embeddings"]
    return []


def instead_of_config(folder: Path) -> ConfigError:
    """What to say of a folder without config.json."""
    if (folder / "adapter_config.json").is_file():
        remedy = "this is an adapter: import its base model, then use smedjan merge"
    else:
        found = sorted(folder.glob("*.gguf"))
        remedy = f"give the file itself: {found[0]}" if found else "give a directory in Hugging Face's layout"
    return ConfigError("is missing", file=folder / "config.json", remedy=remedy)

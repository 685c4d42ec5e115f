"""Models of the Hugging Face hub: `org/name` or `org/name@revision` becomes a directory in the hub's own cache.

Fetched are config.json, the safetensors that transformers would load (by the index, where there is one), the tokenizer
and licence files: never code, never pickles. huggingface_hub does the transfer: a connection that breaks is taken up
where it broke, and a file that is complete is not fetched again. A file that was cut off by the end of the process
starts anew: huggingface_hub gave that up (its pull request 4228), since two writers could meet on one file.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smedjan.checkpoint.safetensors import INDEX, SINGLE, read_weight_map
from smedjan.checkpoint.sizes import format_size, free_bytes, require_space
from smedjan.errors import CheckpointError, DataError, SmedjanError
from smedjan.hf.export import ALONG

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

Kind = Literal["model", "dataset"]
Say = Callable[[str], None]
"""Told one line for the person who waits."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")
_SMALL = ("config.json", *ALONG)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def split_id(name: str) -> tuple[str, str | None]:
    """(org/name, revision)."""
    found = _HUB_ID.fullmatch(name)
    assert found is not None, name
    return found["repo"], found["revision"]


def download(name: str, say: Say) -> Path:
    """The snapshot directory of the model `name`, fetched where it is not yet in the cache.

    The cache alone is asked with HF_HUB_OFFLINE=1, and where the hub cannot be reached, which is said.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    repo, revision = split_id(name)
    with one_line(name, repo):
        try:
            commit, listed = listing(repo, revision)
        except (HTTPError, OfflineModeIsEnabled) as cause:
            if getattr(cause, "response", None) is not None:
                raise
            path = Path(
                snapshot_download(repo, revision=revision, allow_patterns=["config.json"], local_files_only=True)
            )
            say(f"{repo}: the hub is not asked ({reason(cause)}), the copy in the cache is commit {path.name}")
            return path
        cache = Path(constants.HF_HUB_CACHE)
        wanted = [*_small_files(listed), *_weights(name, repo, revision, listed)]
        fetched = [file for file in wanted if not is_cached(cache, repo, listed[file])]
        if fetched:
            need = sum(listed[file].size for file in fetched)
            require_space(cache, need, f"the download of {name}")
            say(
                f"{repo} at {commit[:12]}: {len(fetched)} files to download, {format_size(need)}; "
                f"{format_size(free_bytes(cache))} are free in {cache}"
            )
        patterns = [glob.escape(file) for file in wanted]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def published_sha256(file: Path) -> str | None:
    """The sha256 under which the hub keeps a file of its cache, for the large ones: what came in must have it."""
    if not file.is_symlink():
        return None
    blob = file.readlink()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def listing(repo: str, revision: str | None, kind: Kind = "model") -> tuple[str, dict[str, RepoFile]]:
    """The commit that `revision` names, and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    commit = HfApi().repo_info(repo, repo_type=kind, revision=revision).sha
    assert commit is not None
    tree = HfApi().list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
    return commit, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _small_files(listed: dict[str, RepoFile]) -> list[str]:
    # fnmatch lets a star pass a slash, a directory's glob does not.
    return [
        file
        for file in listed
        if any(fnmatch(file, pattern) and file.count("/") == pattern.count("/") for pattern in _SMALL)
    ]


def _weights(name: str, repo: str, revision: str | None, listed: dict[str, RepoFile]) -> list[str]:
    """The files of weights that transformers would load: one, or an index and the shards that it names."""
    from huggingface_hub import hf_hub_download

    if SINGLE in listed:
        return [SINGLE]
    if INDEX in listed:
        shards = dict.fromkeys(read_weight_map(Path(hf_hub_download(repo, INDEX, revision=revision))).values())
        if lost := [shard for shard in shards if shard not in listed]:
            raise CheckpointError(
                f"the index names the shard {lost[0]}, which the repository lacks",
                file=name,
                field=INDEX,
                remedy="give another revision: org/name@revision",
            )
        return [INDEX, *shards]
    remedy = "give org/name of a model in the layout of transformers"
    if pickled := [file for file in listed if any(fnmatch(file, pattern) for pattern in _PICKLED)]:
        raise CheckpointError(
            f"has no safetensors, only pickled or foreign weights ({pickled[0]}), which can run code when read",
            file=name,
            remedy="look for a revision with safetensors (org/name@refs/pr/N), or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(DIR)",
        )
    if ggufs := [file for file in listed if file.endswith(".gguf")]:
        remedy = f"fetch one file with hf download {repo} {ggufs[0]}, and import that"
    raise CheckpointError(f"holds neither {SINGLE} nor {INDEX}", file=name, remedy=remedy)


def is_cached(cache: Path, repo: str, entry: RepoFile, kind: Kind = "model") -> bool:
    from huggingface_hub.file_download import repo_folder_name

    etag = entry.blob_id if entry.lfs is None else entry.lfs.sha256
    return (cache / repo_folder_name(repo_id=repo, repo_type=kind) / "blobs" / etag).exists()


@contextmanager
def one_line(name: str, repo: str, kind: Kind = "model") -> Iterator[None]:
    """What huggingface_hub raises, as one line with the remedy."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    def error(message: str, remedy: str, field: str | None = None) -> SmedjanError:
        return (CheckpointError if kind == "model" else DataError)(message, file=name, field=field, remedy=remedy)

    called = "model" if kind == "model" else "data set"
    page = f"{constants.ENDPOINT}/{repo if kind == 'model' else f'datasets/{repo}'}"
    log_in = "run hf auth login, or set HF_TOKEN"
    try:
        yield
    except SmedjanError:
        raise
    except hub.GatedRepoError as cause:
        raise error(
            "is gated, and the hub does not let you read it yet", f"accept its licence at {page}, then {log_in}"
        ) from cause
    except hub.RepositoryNotFoundError as cause:
        raise error(
            f"the hub has no such {called}, or it is private", f"check the name; if it is private, {log_in}"
        ) from cause
    except hub.RevisionNotFoundError as cause:
        raise error(
            f"the {called} has no such branch, tag or commit", f"see {page}/tree/main for those it has", "revision"
        ) from cause
    except hub.LocalEntryNotFoundError as cause:
        raise error(
            f"is not in the cache, and the hub is not reached: {reason(cause)}",
            f"check the connection and HF_HUB_OFFLINE, or give a {'directory' if kind == 'model' else 'file'}",
        ) from cause
    except hub.HfHubHTTPError as cause:
        raise error(f"the hub refuses: {reason(cause)}", f"see {page}, and try again") from cause
    except hub.HTTPError as cause:
        raise error(
            f"the connection to the hub broke: {reason(cause)}", "try again: files that are complete are kept"
        ) from cause
    except hub.HFValidationError as cause:
        raise error(f"is no name of a {called}: {reason(cause)}", "give org/name or org/name@revision") from cause
    # hf_xet, which fetches large files in Rust, has no error class but RuntimeError.
    except (OSError, RuntimeError) as cause:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error(
                f"the disk is full: {constants.HF_HUB_CACHE}", "free some space, or set HF_HOME to another disk"
            ) from cause
        raise error(f"cannot be downloaded: {reason(cause)}", "try again: files that are complete are kept") from cause


def reason(cause: BaseException) -> str:
    """The first line of the innermost error: the outer ones are huggingface_hub's paragraphs of advice."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(cause).__name__

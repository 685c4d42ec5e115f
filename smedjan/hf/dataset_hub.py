"""Data sets of the Hugging Face hub: `org/name`, with `@revision` and `:subset` where wanted, becomes a folder of
parquet files in the hub's own cache. Parquet files alone are fetched, of the wanted split: never code. A data set that
is kept in another form has them in the branch into which the hub converts it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from smedjan.checkpoint.sizes import format_size, free_bytes, require_space
from smedjan.data.files import SPLITS, SUFFIXES
from smedjan.errors import DataError
from smedjan.hf.hub import Say, is_cached, is_hub_id, listing, one_line, reason, split_id

CONVERTED = "refs/convert/parquet"


def data_path(data: Path | str, split: str, say: Say = lambda line: None) -> Path:
    """`data` itself where it is there, or is no name of the hub; else the folder that holds its `split`."""
    path = Path(data)
    name, _, subset = str(data).partition(":")
    if path.exists() or path.suffix in SUFFIXES or not is_hub_id(name):
        return path
    return _download(name, subset, split, say)


def _download(name: str, subset: str, split: str, say: Say) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError

    repo, revision = split_id(name)
    with one_line(name, repo, "dataset"):
        try:
            commit, listed = listing(repo, revision, "dataset")
            if revision is None and not any(file.endswith(".parquet") for file in listed):
                # Data sets that run code are not converted, nor are very new ones
                with suppress(RevisionNotFoundError):
                    commit, listed = listing(repo, CONVERTED, "dataset")
                    revision = CONVERTED
        except (HTTPError, OfflineModeIsEnabled) as cause:
            if getattr(cause, "response", None) is not None:
                raise
            under = f"{subset}/" if subset else ""
            # Those of the split must all be there, says huggingface_hub, which keeps what the hub has listed
            patterns = [form for called in SPLITS[split] for form in (f"{under}{called}*", f"*/{under}{called}*")]
            kept: dict[str, Any] = {"repo_type": "dataset", "local_files_only": True, "allow_patterns": patterns}
            try:
                root = Path(snapshot_download(repo, revision=revision, **kept))
            except LocalEntryNotFoundError:
                if revision is not None:
                    raise
                root = Path(snapshot_download(repo, revision=CONVERTED, **kept))
            say(f"{repo}: the hub is not asked ({reason(cause)}), the copy in the cache is commit {root.name}")
            there = (file.relative_to(root).as_posix() for file in root.rglob("*.parquet"))
            return root / _chosen(there, name, subset, split)[0]
        folder, wanted = _chosen(listed, name, subset, split)
        cache = Path(constants.HF_HUB_CACHE)
        fetched = [file for file in wanted if not is_cached(cache, repo, listed[file], "dataset")]
        if fetched:
            need = sum(listed[file].size for file in fetched)
            require_space(cache, need, f"the download of {name}")
            say(
                f"{repo} at {commit[:12]}: {len(fetched)} files to download, {format_size(need)}; "
                f"{format_size(free_bytes(cache))} are free in {cache}"
            )
        patterns = [glob.escape(file) for file in wanted]
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)) / folder


def _chosen(files: Iterable[str], name: str, subset: str, split: str) -> tuple[str, list[str]]:
    """(folder, its parquet files of `split`): SUBSET/train-00000-of-00001.parquet, or SUBSET/train/0000.parquet."""
    parquet = sorted(file for file in files if file.endswith(".parquet"))
    called = "|".join(SPLITS[split])
    form = re.compile(rf"(?:(.+)/)?(?:{called})(?:(?:-\d+-of-\d+(?:-[0-9a-f]{{16}})?)?\.parquet|/[^/]+\.parquet)")
    folders: dict[str, list[str]] = {}
    for file in parquet:
        if found := form.fullmatch(file):
            folders.setdefault(found[1] or "", []).append(file)
    if subset:
        folders = {folder: of for folder, of in folders.items() if subset in PurePosixPath(folder).parts}
    if len(folders) == 1:
        return next(iter(folders.items()))
    if folders:
        subsets = ", ".join(sorted({PurePosixPath(folder).name or "." for folder in folders}))
        raise DataError(f"has several subsets: {subsets}", file=name, remedy="name one of them: org/name:SUBSET")
    known = f" ({', '.join(parquet[:8])}{', ...' if len(parquet) > 8 else ''})" if parquet else ""
    which = f" in its subset {subset!r}" if subset else ""
    raise DataError(
        f"has no parquet file of the split {split}{which}{known}",
        file=name,
        remedy=f"fetch what you want with hf download {name} --repo-type dataset, and give the file",
    )

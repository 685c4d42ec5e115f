"""Against a hub on this machine that speaks what huggingface_hub asks of the real one: what is fetched, what is kept,
what is said before it, and one line for everything that can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from smedjan.errors import CheckpointError
from smedjan.hf.hub import is_hub_id, published_sha256
from smedjan.hf.import_model import import_model

Make = Callable[..., Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Larger files are in the hub's large file storage, addressed by sha256 where others have git's sha1.
LARGE = 20_000


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class Repository:
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", "refs/pr/1")
    gated: bool = False


@dataclass
class Hub:
    """`requests` are (method, path, Range) of files; a file in `cut` breaks off after so many bytes, once for each."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: int = 200

    def fetched(self) -> list[str]:
        return sorted({path for method, path, _ in self.requests if method == "GET"})


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b'{"error": "said at length"}', X_Error_Code=code, X_Error_Message="said at length")

    def do_GET(self) -> None:
        if self.hub.status != 200:
            return self.answer(self.hub.status, b"out of order")
        # Data sets lie beside the models
        path = unquote(urlsplit(self.path).path).replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        api, _, rest = path.removeprefix("/").partition("models/") if path.startswith("/api/") else ("", "", path[1:])
        name = "/".join(rest.split("/")[:2])
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        action, _, rest = rest.removeprefix(name).strip("/").partition("/")
        revision = next((one for one in self._known(repository) if rest == one or rest.startswith(one + "/")), None)
        if action and revision is None:
            return self.refuse(404, "RevisionNotFound")
        commit = commit_of("main") if revision is None else self._known(repository)[revision]
        if api and action != "tree":
            body = {"id": name, "modelId": name, "sha": commit, "siblings": [], "tags": [], "private": False}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        if api:
            tree = [self._entry(file, content) for file, content in repository.files.items()]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        assert revision is not None
        return self._file(repository, commit, rest.removeprefix(revision + "/"))

    do_HEAD = do_GET

    def _known(self, repository: Repository) -> dict[str, str]:
        commits = {revision: commit_of(revision) for revision in repository.revisions}
        return {**commits, **{commit: commit for commit in commits.values()}}

    def _entry(self, file: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if len(content) > LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, repository: Repository, commit: str, file: str) -> None:
        self.hub.requests.append((self.command, file, self.headers.get("Range")))
        if repository.gated and self.headers.get("Authorization") != "Bearer hf_granted":
            return self.refuse(403, "GatedRepo")
        content = repository.files.get(file)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        entry = self._entry(file, content)
        tag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if not (asked := self.headers.get("Range")):
            begin, status = 0, 200
        else:
            begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.hub.cut.get(file):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content) - begin), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[begin : begin + self.hub.cut[file].pop(0)])
            self.close_connection = True
            return None
        return self.answer(status, content[begin:], **headers)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories; huggingface_hub is pointed at it, with an empty cache and no token."""
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": made}))
    made.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield made
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


OTHERS = {
    "modeling_custom.py": b"raise SystemExit('run')",
    "pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR.",
    "original/consolidated.00.pth": b"pickle",
    "consolidated.safetensors": b"another layout",
    "model.fp16.safetensors": b"a variant",
    "onnx/model.safetensors": b"another again",
    "onnx/config.json": b"{}",
    "README.md": b"# read me",
    "training_args.bin": b"pickle",
    ".gitattributes": b"",
}


@pytest.fixture
def published(hub: Hub, model_directory: Make) -> dict[str, bytes]:
    """org/tiny on the hub: a tiny Llama, among files of other kinds. Gives the files that are ours to read."""
    ours = {**files_of(model_directory()), "LICENSE": b"do as you like"}
    hub.repositories["org/tiny"] = Repository({**OTHERS, **ours})
    return ours


def shard(hub: Hub, directory: Path) -> list[str]:
    """Puts the model of `directory` into org/tiny as shards and gives their names."""
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="100KB")
    (directory / WEIGHTS).unlink(missing_ok=True)
    hub.repositories["org/tiny"] = Repository({**OTHERS, **files_of(directory)})
    return sorted(path.name for path in directory.glob("*.safetensors"))


def test_what_we_read_is_fetched_and_nothing_else(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    """Once; the second import asks only what the branch is now. What came in has the hashes that were published."""
    said: list[str] = []
    report = import_model("org/tiny", tmp_path / "out", say=said.append)
    assert hub.fetched() == sorted(published)
    assert {file["path"]: file["sha256"] for file in report.sources} == {
        path: hashlib.sha256(content).hexdigest() for path, content in published.items()
    }
    assert f"org/tiny is commit {commit_of('main')}" in report.notes
    (line,) = said
    size = f"{sum(map(len, published.values())) / 1000:.0f} KB"
    assert line.startswith(f"org/tiny at {commit_of('main')[:12]}: {len(published)} files to download, {size};")
    assert line.endswith(f"are free in {constants.HF_HUB_CACHE}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == report.parameters
    hub.requests.clear()
    import_model("org/tiny", tmp_path / "again", say=said.append)
    assert (hub.fetched(), len(said)) == ([], 1)


def test_of_an_index_only_its_shards_are_fetched(hub: Hub, tmp_path: Path, model_directory: Make) -> None:
    shards = shard(hub, model_directory())
    assert len(shards) > 3
    hub.repositories["org/tiny"].files["model-00009-of-00009.safetensors"] = b"of another time"
    import_model("org/tiny", tmp_path / "out")
    assert [file for file in hub.fetched() if file.endswith(("safetensors", "index.json"))] == sorted([*shards, INDEX])


@pytest.mark.parametrize("revision", ["refs/pr/1", commit_of("refs/pr/1")])
def test_a_revision_is_a_branch_or_a_commit(
    revision: str, hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    report = import_model(f"org/tiny@{revision}", tmp_path / "out")
    assert f"org/tiny@{revision} is commit {commit_of('refs/pr/1')}" in report.notes


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last whole piece (of 10 MB) that huggingface_hub had written."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.cut[WEIGHTS] = [110_000, 50_000]
    import_model("org/tiny", tmp_path / "out")
    ranges = [asked for method, path, asked in hub.requests if (method, path) == ("GET", WEIGHTS)]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_after_an_interrupted_download_only_the_rest_is_fetched(
    hub: Hub, tmp_path: Path, model_directory: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard breaks off for good: the error is one line, and the next run fetches that shard alone."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shards = shard(hub, model_directory())
    hub.cut[shards[-1]] = [0] * 6
    error = refused("org/tiny", tmp_path / "out")
    assert "the connection to the hub broke: " in str(error)
    assert str(error).endswith("try again: files that are complete are kept")
    hub.cut.clear()
    hub.requests.clear()
    said: list[str] = []
    import_model("org/tiny", tmp_path / "out", say=said.append)
    assert shards[-1] in hub.fetched()
    assert shards[0] not in hub.fetched()
    assert "files to download" in said[0]


def refused(name: str, out: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        import_model(name, out)
    assert caught.value.file == name
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return caught.value


def test_a_gated_model_says_how_to_get_it(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"].gated = True
    error = refused("org/tiny", tmp_path / "out")
    assert error.message == "is gated, and the hub does not let you read it yet"
    assert error.remedy == f"accept its licence at {hub.endpoint}/org/tiny, then run hf auth login, or set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert import_model("org/tiny", tmp_path / "out").model_type == "llama"


def test_what_the_hub_does_not_have(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    error = refused("org/nothing", tmp_path / "out")
    assert "no such model, or it is private; check the name; if it is private, run hf auth login" in str(error)
    error = refused("org/tiny@v9", tmp_path / "out")
    assert (error.field, error.message) == ("revision", "the model has no such branch, tag or commit")
    error = refused("org/--tiny", tmp_path / "out")
    assert "is no name of a model" in str(error)
    hub.status = 500
    error = refused("org/tiny", tmp_path / "out")
    assert "the hub refuses: " in str(error)
    assert "500" in str(error)


def test_pickles_alone_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/old"] = Repository({"config.json": b"{}", "pytorch_model.bin": bytes(30_000)})
    error = refused("org/old", tmp_path / "out")
    assert "has no safetensors, only pickled or foreign weights (pytorch_model.bin)" in str(error)
    assert "org/name@refs/pr/N" in str(error)
    hub.repositories["org/old"] = Repository({"tiny.Q4_0.gguf": b"GGUF"})
    assert "hf download org/old tiny.Q4_0.gguf" in str(refused("org/old", tmp_path / "out"))
    hub.repositories["org/old"] = Repository({"README.md": b""})
    assert f"holds neither {WEIGHTS} nor {INDEX}" in str(refused("org/old", tmp_path / "out"))
    assert hub.fetched() == []


def test_an_index_that_names_what_is_not_there(hub: Hub, tmp_path: Path, model_directory: Make) -> None:
    shards = shard(hub, model_directory())
    del hub.repositories["org/tiny"].files[shards[1]]
    error = refused("org/tiny", tmp_path / "out")
    assert f"the index names the shard {shards[1]}, which the repository lacks" in str(error)
    assert hub.fetched() == [INDEX]


def test_a_full_disk_is_said_before_the_download(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=123_000))
    with pytest.raises(CheckpointError) as caught:
        import_model("org/tiny", tmp_path / "out")
    need = f"{sum(map(len, published.values())) / 1000:.0f} KB"
    assert f"the download of org/tiny takes {need}, the disk has 123 KB free" in str(caught.value)
    assert hub.fetched() == []


def test_a_damaged_download_is_not_imported(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    """The cache's file of weights no longer has the sha256 under which the hub published it."""
    import_model("org/tiny", tmp_path / "out")
    (weights,) = Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/*/{WEIGHTS}")
    assert published_sha256(weights) == hashlib.sha256(published[WEIGHTS]).hexdigest()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match=r"its sha256 is \w{64}, the hub published \w{64}") as caught:
        import_model("org/tiny", tmp_path / "again")
    assert caught.value.file == str(weights)
    assert not (tmp_path / "again").exists()


def test_without_the_hub_the_cache_serves(
    hub: Hub, published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to be offline, or with no hub that answers: the copy in the cache is taken and that is said."""
    import_model("org/tiny", tmp_path / "first")
    hub.requests.clear()
    for name, how in (("a", "offline"), ("b", "unreachable")):
        said: list[str] = []
        with monkeypatch.context() as patch:
            if how == "offline":
                patch.setattr(constants, "HF_HUB_OFFLINE", True)
            else:
                patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            huggingface_hub.close_session()
            import_model("org/tiny", tmp_path / name, say=said.append)
            assert said[0].startswith("org/tiny: the hub is not asked (")
            assert commit_of("main") in said[0]
            error = refused("org/other", tmp_path / "other")
            assert "is not in the cache, and the hub is not reached: " in str(error)
            assert "check the connection and HF_HUB_OFFLINE" in str(error)
    assert hub.requests == []


def test_the_command_says_the_need_and_names_the_sources(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "smedjan", "import", "org/tiny", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(published)} files to download" in done.stderr
    assert {file["path"] for file in json.loads(done.stdout)["sources"]} == set(published)
    command[4:6] = ["org/nothing", str(tmp_path / "other")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["file"] == "org/nothing"


@pytest.mark.parametrize("name", ["org/name", "org/na.me-1_0@main", "o/n@refs/pr/3", "o/n@1a2b"])
def test_names_of_the_hub(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["name", "/abs/path", "../up", "a/b/c", "org/name@", "org/", "./x/y", "org/n@../x"])
def test_paths_are_no_names_of_the_hub(name: str) -> None:
    assert not is_hub_id(name)

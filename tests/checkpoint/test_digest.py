"""Jobs on threads end together: with all results, or with the first error and no job left running."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from smedjan.checkpoint.digest import Go, hashing, sha256_of_file, started
from smedjan.errors import CheckpointError


def endless(go: Go) -> None:
    while True:
        go()
        time.sleep(0.001)


def test_results_are_in_the_order_of_the_jobs() -> None:
    def job(index: int) -> int:
        time.sleep(0.02 / (1 + index))
        return index

    with started([lambda go, index=index: job(index) for index in range(9)]) as results:
        assert results() == list(range(9))
    with started([]) as results:
        assert results() == []


@pytest.mark.parametrize("error", [CheckpointError("bad"), KeyboardInterrupt()])
def test_an_error_stops_the_other_jobs_and_is_raised(error: BaseException) -> None:
    """Also those that would never end by themselves; those not yet begun never begin."""
    begun: list[int] = []
    before = threading.active_count()

    def fails(go: Go) -> None:
        raise error

    jobs = [endless, endless, fails, *[lambda go: begun.append(1)] * 3]
    with pytest.raises(type(error)) as caught, started(jobs, threads=3) as results:
        results()
    assert caught.value is error
    assert threading.active_count() == before
    assert begun == []


def test_an_error_of_the_block_stops_the_jobs() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), started([endless, endless]):
        raise ZeroDivisionError
    assert threading.active_count() == before


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_001])
def test_sha256_is_hashlib_s(size: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    expected = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert sha256_of_file(tmp_path / "a") == expected
    with started(hashing([tmp_path / "a"] * 2)) as results:
        assert results() == [expected] * 2


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file") as caught:
        sha256_of_file(tmp_path / "nowhere")
    assert caught.value.file == str(tmp_path / "nowhere")

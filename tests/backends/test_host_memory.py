"""What is available is the kernel's word, within the tightest limit of all groups that hold the process."""

from __future__ import annotations

from pathlib import Path

from smedjan.backends.host_memory import available_bytes

GIB = 1 << 30


def machine(root: Path, free: int, cgroup: str = "") -> Path:
    """A root with `free` bytes available and the process's groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemFree:        1 kB\nMemAvailable:   {free // 1024} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, limit: str, used: int, cached: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    most, current = ("memory.max", "memory.current") if version == 2 else MOST_V1
    (folder / most).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    name = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{name} {cached}\n")


MOST_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_without_groups_it_is_the_kernels_word(tmp_path):
    assert available_bytes(machine(tmp_path, 3 * GIB)) == 3 * GIB


def test_a_group_leaves_its_limit_less_what_is_used_but_for_cached_files(tmp_path):
    machine(tmp_path, 30 * GIB, "0::/job/own\n")
    group(tmp_path / "sys/fs/cgroup/job/own", f"{8 * GIB}", 3 * GIB, GIB, version=2)
    assert available_bytes(tmp_path) == 6 * GIB


def test_an_outer_group_may_be_tighter(tmp_path):
    machine(tmp_path, 30 * GIB, "0::/job/own\n")
    group(tmp_path / "sys/fs/cgroup/job/own", "max", 3 * GIB, 0, version=2)
    group(tmp_path / "sys/fs/cgroup/job", f"{4 * GIB}", 3 * GIB, 0, version=2)
    assert available_bytes(tmp_path) == GIB


def test_the_first_version_has_its_own_names_and_no_word_for_no_limit(tmp_path):
    machine(tmp_path, 30 * GIB, "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    group(tmp_path / "sys/fs/cgroup/memory/job", f"{2 * GIB}", GIB, GIB // 2, version=1)
    group(tmp_path / "sys/fs/cgroup/memory", "9223372036854771712", 50 * GIB, 0, version=1)
    assert available_bytes(tmp_path) == GIB + GIB // 2


def test_in_a_namespace_the_own_group_is_the_outermost(tmp_path):
    """The path is one of the machine outside, of which nothing is to be seen."""
    machine(tmp_path, 30 * GIB, "0::/../../elsewhere\n")
    group(tmp_path / "sys/fs/cgroup", f"{5 * GIB}", GIB, 0, version=2)
    assert available_bytes(tmp_path) == 4 * GIB


def test_what_is_used_up_is_nothing(tmp_path):
    machine(tmp_path, 30 * GIB, "0::/job\n")
    group(tmp_path / "sys/fs/cgroup/job", f"{GIB}", 2 * GIB, 0, version=2)
    assert available_bytes(tmp_path) == 0


def test_a_machine_that_does_not_say(tmp_path):
    assert available_bytes(tmp_path) is None

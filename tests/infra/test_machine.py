"""The resources that a scheduler gave this process count, not those of the machine."""

import os
import shutil
from pathlib import Path

import pytest

from infra import machine

GIB = 2**30


@pytest.fixture
def machine_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_cpu_affinity_limits_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5, 7})
    assert machine.count_cpus(tmp_path, {}) == 3


@pytest.mark.usefixtures("machine_of_64")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        # Half a core is one, and one and a half are one, too.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        # The job's cgroup has no limit, and the one above it has.
        (
            {
                "proc/self/cgroup": "0::/slice/job\n",
                "sys/fs/cgroup/slice/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/slice/job/cpu.max": "max 100000\n",
            },
            8,
        ),
        # The host's path, in a container that sees its own cgroup as the top.
        (
            {
                "proc/self/cgroup": "0::/docker/abc\n",
                "sys/fs/cgroup/cpu.max": "200000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/a\n4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)
def test_a_cgroup_s_quota_limits_the_cores(
    files: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    assert machine.count_cpus(write_files(tmp_path, files), {}) == cpus


@pytest.mark.usefixtures("machine_of_64")
@pytest.mark.parametrize(
    ("env", "cpus"),
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        ({"SLURM_CPUS_ON_NODE": "128"}, 64),
        ({"SLURM_CPUS_PER_TASK": ""}, 64),
    ],
)
def test_slurm_s_allocation_limits_the_cores(
    env: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    assert machine.count_cpus(tmp_path, env) == cpus


@pytest.mark.parametrize(
    ("files", "env", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000000\n"}, {}, 1_000_000),
        (
            {
                "proc/self/cgroup": "9:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2000000\n",
            },
            {},
            2_000_000,
        ),
        ({}, {"SLURM_MEM_PER_NODE": "3"}, 3 * 2**20),
    ],
)
def test_memory_is_what_the_cgroup_or_slurm_gave(
    files: dict[str, str], env: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert machine.memory_bytes(write_files(tmp_path, files), env) == expected


@pytest.mark.parametrize(
    ("files", "env"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, {}),
        (
            {
                "proc/self/cgroup": "9:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            {},
        ),
        ({}, {"SLURM_MEM_PER_NODE": "0"}),
    ],
)
def test_memory_without_a_limit_is_the_machine_s(
    files: dict[str, str], env: dict[str, str], tmp_path: Path
) -> None:
    everything = machine.psutil.virtual_memory().total
    assert machine.memory_bytes(write_files(tmp_path, files), env) == everything


@pytest.mark.parametrize(
    ("memory", "free", "expected"),
    [
        (64 * GIB, 32 * GIB, GIB),
        (2 * GIB, 32 * GIB, 644_245_094),  # three tenths
        (64 * GIB, 500_000_000, 450_000_000),  # nine tenths
        # Docker's own 64 MiB: Ray takes a folder on the disk.
        (64 * GIB, 64 * 2**20, GIB),
        (2**28, 32 * GIB, 2**27),
    ],
)
def test_the_object_store_fits_in_memory_and_in_shared_memory(
    memory: int, free: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _folder: usage)
    assert machine.object_store_bytes(memory, tmp_path) == expected


LISTING = """\
GPU 0: NVIDIA A100 (UUID: GPU-aa01)
  MIG 3g.20gb     Device  0: (UUID: MIG-11)
  MIG 3g.20gb     Device  1: (UUID: MIG-12)
GPU 1: NVIDIA A100 (UUID: GPU-aa02)
GPU 2: NVIDIA A100 (UUID: GPU-bb03)
GPU 3: NVIDIA A100 (UUID: GPU-bb04)
"""


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ("2,3", 2),
        ("0", 1),
        (" 0 , 1 ", 2),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("none", 0),
        ("0,-1,1", 1),
        ("0,7,1", 1),
        ("1,1", 0),
        ("GPU-bb03,GPU-bb04", 2),
        ("GPU-bb", 0),  # two begin like this
        ("GPU-cc", 0),
        ("MIG-11,MIG-12", 2),
        ("MIG-GPU-aa01/1/0", 1),
    ],
)
def test_cuda_visible_devices_decides_how_many_gpus_there_are(chosen: str, count: int) -> None:
    assert machine.count_gpus({"CUDA_VISIBLE_DEVICES": chosen}) == count


@pytest.mark.usefixtures("four_gpus")
def test_without_cuda_visible_devices_all_gpus_count() -> None:
    assert machine.count_gpus({}) == 4


def test_without_the_driver_s_tool_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.count_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == 0

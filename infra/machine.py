"""Find out how many CPU cores, GPUs and how much memory of this machine the process may use.

A scheduler (Slurm, Kubernetes, Docker, taskset) often grants a process less than the machine has.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

NVIDIA_SMI_TIMEOUT_S = 30.0

# With less than this, Ray's own processes leave no room for data in the object store.
MIN_OBJECT_STORE_BYTES = 2**27
MAX_OBJECT_STORE_BYTES = 2**30
# On one machine, no process has to watch for nodes that the cloud is about to take away.
ONE_NODE_OF_RAY = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def count_cpus(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """Count the CPU cores that this process may use.

    The result is the smallest of CPU affinity, the cgroup's quota and Slurm's allocation.
    """
    limits = [float(_count_affine_cpus()), *_cgroup_cpus(root)]
    # Without a plugin, a Slurm cluster does not enforce its allocation.
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if env.get(name, "").isdecimal():
            limits.append(float(env[name]))
            break
    return max(1, int(min(limits)))


def _count_affine_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """Return the memory in bytes that this process may use: of the machine, cgroup or Slurm job."""
    limits = [int(psutil.virtual_memory().total), *_cgroup_memory(root)]
    slurm_mib = env.get("SLURM_MEM_PER_NODE", "")
    if slurm_mib.isdecimal() and int(slurm_mib) > 0:  # 0 means the whole node
        limits.append(int(slurm_mib) * 2**20)
    return min(limits)


def object_store_bytes(memory: int, shared_memory: Path = Path("/dev/shm")) -> int:
    """Return how many bytes Ray's object store may take.

    The store is in shared memory, which counts towards the cgroup's limit. Where shared memory is
    too small to be useful, Ray uses a folder on disk instead, so it sets no limit then.
    """
    wanted = min(MAX_OBJECT_STORE_BYTES, memory * 3 // 10)
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        # Ray uses the folder on disk unless the whole size is free.
        if free * 9 // 10 >= MIN_OBJECT_STORE_BYTES:
            wanted = min(wanted, free * 9 // 10)
    return max(wanted, MIN_OBJECT_STORE_BYTES)


def count_gpus(env: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs that CUDA would offer this process, without the slow import of torch."""
    gpus, slices = _list_gpus()
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(gpus)
    seen: set[str] = set()
    for word in (part.strip() for part in chosen.split(",")):
        device = _find_device(word, gpus, slices)
        if device is None:
            break  # as in CUDA: devices after one that does not exist are ignored
        if device in seen:
            return 0  # CUDA offers no device if one is named twice
        seen.add(device)
    return len(seen)


def _find_device(word: str, gpus: list[str], slices: list[str]) -> str | None:
    """Return the UUID of the device that CUDA_VISIBLE_DEVICES names by number or by UUID."""
    if word.isdecimal():
        return gpus[int(word)] if int(word) < len(gpus) else None
    if not word.startswith(("GPU-", "MIG-")):
        return None
    # The beginning of a UUID is enough if it is unique.
    found = [uuid for uuid in [*gpus, *slices] if uuid.startswith(word)]
    # Drivers before 470 name a slice MIG-GPU-UUID/INSTANCE/INSTANCE.
    if not found and word.startswith("MIG-GPU-"):
        found = [word for gpu in gpus if word.removeprefix("MIG-").startswith(gpu)]
    return found[0] if len(found) == 1 else None


def _list_gpus() -> tuple[list[str], list[str]]:
    """List the UUIDs of the GPUs, and of the MIG slices that some of them are split into."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            check=False,
            timeout=NVIDIA_SMI_TIMEOUT_S,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return [], []
    lines = [line.strip() for line in listing.splitlines()]
    uuids = [line.rpartition("UUID: ")[2].rstrip(")") for line in lines]
    named = list(zip(lines, uuids, strict=True))
    return (
        [uuid for line, uuid in named if line.startswith("GPU ")],
        [uuid for line, uuid in named if line.startswith("MIG ")],
    )


def _cgroup_cpus(root: Path) -> list[float]:
    limits = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, period = _read_words(folder / "cpu.max") or ("max", "")
        if quota != "max" and float(period) > 0:
            limits.append(float(quota) / float(period))
        v1 = [_read_words(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if v1[0] and v1[1] and float(v1[0][0]) > 0:  # -1 means no limit
            limits.append(float(v1[0][0]) / float(v1[1][0]))
    return limits


def _cgroup_memory(root: Path) -> list[int]:
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            words = _read_words(folder / name)
            if words and words[0].isdecimal():
                limits.append(int(words[0]))
    return limits


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """List the process's cgroup of one controller and its parents, each of which may limit it."""
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            tops = [mounts]
        elif controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        else:
            continue
        for top in tops:
            # In a container the path may be the host's, which does not exist here.
            place = top / path.lstrip("/")
            folders += [each for each in [place, *place.parents] if each.is_relative_to(top)]
    return folders


def _read_words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []

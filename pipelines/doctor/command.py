"""`mae doctor`: check in advance what a run will need, and suggest a fix for each finding.

    mae doctor [storage.root=...] [tracking.uri=...]

The exit code is 0, or 5 if a check failed. A server that is down or hangs costs seconds, not
minutes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement
from pydantic import Field

from infra import machine, storage
from infra.config import StorageConfig, TrackingConfig
from infra.redaction import redact
from mae_core.config import StrictConfig
from mae_core.data.dicom_images import missing_syntaxes
from mae_core.data.tiff_images import missing_codecs
from pipelines.config.loading import load_config
from pipelines.doctor.services import (
    Finding,
    Level,
    check_mlflow,
    check_ray,
    check_storage,
    installed_version,
    nearest_folder,
)
from pipelines.job import ROOT
from pipelines.terminal import progress
from pipelines.terminal.progress import Progress

INFRASTRUCTURE = 5  # exit code
CHECK_TIMEOUT_S = 60.0  # for everything in one check; importing torch may take long
MIN_FREE_BYTES = 10 * 2**30
MIN_SHM_BYTES = 2**30  # what a run on one machine gives Ray's object store
# S3 refuses requests whose time is 15 minutes off; a Date header counts whole seconds.
CLOCK_WARN_S, CLOCK_FAIL_S = 5.0, 300.0
TORCH_PROBE = (
    "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda,"
    " torch.cuda.device_count()]))"
)


class DoctorConfig(StrictConfig):
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)


def command(words: Sequence[str]) -> int:
    """Run `mae doctor WORDS`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="mae doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="storage.root, tracking.uri")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    config = load_config(DoctorConfig, [], parser.parse_intermixed_args(words).words)
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": partial(check_packages, ROOT),
        "codecs": check_codecs,
        "gpu": check_gpu,
        "ray": check_ray,
        "storage": partial(check_storage, config.storage.root),
        "mlflow": partial(check_mlflow, config.tracking.uri),
        "disk": partial(check_disk, config.storage.root),
        "shm": check_shm,
    }
    findings = run_checks(checks)
    findings["clock"] = (check_clock([one for one, _ in findings.values()]), 0.0)
    for name, (finding, seconds) in findings.items():
        _say(f"{finding.level:4}  {name:8}  {seconds:5.1f} s  {finding.what}")
        if finding.fix:
            _say(f"{'':25}fix: {finding.fix}")
    levels = [finding.level for finding, _ in findings.values()]
    _say(f"{levels.count('ok')} ok, {levels.count('warn')} warn, {levels.count('FAIL')} FAIL")
    return INFRASTRUCTURE if "FAIL" in levels else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{redact(text)}\n")


def run_checks(
    checks: Mapping[str, Callable[[], Finding]], timeout_s: float = CHECK_TIMEOUT_S
) -> dict[str, tuple[Finding, float]]:
    """Run all checks at once; a check that hangs or breaks becomes a finding as well."""
    found: dict[str, tuple[Finding, float]] = {}

    def run(name: str, check: Callable[[], Finding]) -> None:
        started_s = time.monotonic()
        try:
            finding = check()
        except Exception as error:
            what = f"could not be checked: {type(error).__name__}: {error}"
            finding = Finding("warn", what, "report it, with this line")
        found[name] = (finding, time.monotonic() - started_s)

    # Daemons, so that a check that hangs does not keep the command from ending.
    threads = {
        name: threading.Thread(target=run, args=(name, check), daemon=True)
        for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    deadline_s = time.monotonic() + timeout_s

    def how_far() -> Progress:
        waits_for = ", ".join(name for name in checks if name not in found)
        return Progress("checking this machine", len(found), len(checks), f"waits for {waits_for}")

    with progress.doing("checking this machine", how_far):
        for thread in threads.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))
    hung = Finding("FAIL", f"no answer within {timeout_s:.0f} s", "check what it needs; try again")
    return {name: found.get(name, (hung, timeout_s)) for name in checks}


def check_python() -> Finding:
    version = f"{platform.python_version()} on {platform.platform()}, {machine.count_cpus()} CPUs"
    return Finding("ok", version)


def check_packages(folder: Path) -> Finding:
    """Compare the installed packages with pyproject.toml, and with requirements.lock if present."""
    file, lock = folder / "pyproject.toml", folder / "requirements.lock"
    if not file.is_file():
        return Finding("warn", f"no {file} to compare with", "run from a checkout of the project")
    asked = map(Requirement, tomllib.loads(file.read_text())["project"]["dependencies"])
    wrong = []
    for need in asked:
        have = installed_version(need.name)
        if have is None or not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have or 'is missing'}, needed {need.specifier}")
    if wrong:
        return Finding("FAIL", "; ".join(wrong), f"pip install -r {lock} (make install)")
    pins = [Requirement(line) for line in _lock_lines(lock)]
    # Some are not for this machine: CUDA packages are not installed where there is no CUDA.
    installed = [(pin, installed_version(pin.name)) for pin in pins]
    off = [
        f"{pin.name} {have}{pin.specifier}".replace("==", ", locked ")
        for pin, have in installed
        if have is not None and not pin.specifier.contains(have.partition("+")[0], prereleases=True)
    ]
    if off:
        more = f" and {len(off) - 5} more" if len(off) > 5 else ""
        what = f"differs from the tested versions: {'; '.join(off[:5])}{more}"
        return Finding("warn", what, f"pip install -r {lock} (make install)")
    count = sum(have is not None for _, have in installed)
    return Finding("ok", f"as pyproject.toml asks, {count} as locked")


def _lock_lines(lock: Path) -> list[str]:
    lines = lock.read_text().splitlines() if lock.is_file() else []
    return [line for line in lines if line.strip() and not line.startswith(("#", "-"))]


def check_codecs() -> Finding:
    """List the compressions of TIFF and DICOM that can't be read here.

    Images that use one of them are left out as `unsupported`.
    """
    tiff, dicom = missing_codecs(), missing_syntaxes()
    if tiff:
        fix = "pip install imagecodecs"
        return Finding("FAIL", f"TIFFs compressed by {', '.join(tiff)} can't be read", fix)
    what = "JPEG, PNG, WebP, and TIFF with LZW, deflate, zstd, LZMA, PackBits, JPEG and CCITT"
    if dicom:
        return Finding("ok", f"{what}; not DICOM with {', '.join(dicom)} (pylibjpeg adds them)")
    return Finding("ok", f"{what}; DICOM with all common compressions")


def check_gpu() -> Finding:
    cards = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    probe = _output([sys.executable, "-c", TORCH_PROBE])
    try:
        version, cuda, count = json.loads(probe or "")
    except ValueError:
        return Finding("FAIL", "torch can't be imported", "pip install -r requirements.lock")
    built = f"torch {version}, CUDA {cuda or 'not in this build'}"
    names = (cards or "").strip().splitlines()
    if not names and not count:
        return Finding("ok", f"none: training runs on the CPU ({built})")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count and chosen is not None and machine.count_gpus() == 0:
        hidden = f"CUDA_VISIBLE_DEVICES={chosen} names none of {'; '.join(names)}"
        return Finding("ok", f"none: training runs on the CPU ({hidden}; {built})")
    if not count:
        fix = "install torch's CUDA build, and a driver as new as its CUDA asks for (nvidia-smi)"
        return Finding("FAIL", f"{'; '.join(names)}: not seen by {built}", fix)
    return Finding("ok", f"{count} seen by {built}: {'; '.join(names) or 'no nvidia-smi'}")


def _output(words: list[str]) -> str | None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S - 10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def check_disk(root: str) -> Finding:
    """Check the disk of the runs' folder; if that is on S3, the disk to which Ray spills."""
    folder = Path("/tmp") if storage.is_remote(root) else nearest_folder(storage.absolute(root))
    free = shutil.disk_usage(folder).free
    what = f"{_gib(free)} free for {folder}"
    if free < MIN_FREE_BYTES:
        return Finding("warn", what, "make room, or choose another storage.root (Ray: RAY_TMPDIR)")
    return Finding("ok", what)


def check_shm(folder: Path = Path("/dev/shm")) -> Finding:
    if not folder.is_dir():
        return Finding("ok", f"no {folder} here: Ray keeps objects in files")
    free = shutil.disk_usage(folder).free
    what = f"{_gib(free)} free in {folder}"
    if free < MIN_SHM_BYTES:
        fix = "docker run --shm-size=2g, or an emptyDir with medium Memory: else Ray uses the disk"
        return Finding("warn", what, fix)
    return Finding("ok", what)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def check_clock(findings: Iterable[Finding]) -> Finding:
    """Compare our clock with those of the servers that answered."""
    pairs = [one.server_time for one in findings if one.server_time is not None]
    if not pairs:
        return Finding(
            "ok", f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}, with no server to compare with"
        )
    off_s = max(((ours - theirs).total_seconds() for theirs, ours in pairs), key=abs)
    what = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the servers'"
    if abs(off_s) < CLOCK_WARN_S:
        return Finding("ok", what)
    level: Level = "FAIL" if abs(off_s) >= CLOCK_FAIL_S else "warn"
    return Finding(level, what, "set the clock that is wrong (timedatectl set-ntp true)")

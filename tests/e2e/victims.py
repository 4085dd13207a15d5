"""Processes of a run that a test kills."""

from contextlib import suppress

import psutil


def train_workers(driver: int) -> list[psutil.Process]:
    """Ray Train's workers of a driver; others of its children may end while we look."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found

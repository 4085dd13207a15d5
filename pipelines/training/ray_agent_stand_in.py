"""Take the place of an agent of a local Ray: do nothing until the raylet that started it ends.

Run as a program by the raylet, so that it starts in some milliseconds: it imports nothing of ours.
See `pipelines.training.local_ray`.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # prctl(2): the kernel sends a signal when the parent ends


def main() -> None:
    raylet = int(os.environ["RAY_RAYLET_PID"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends Ray
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while os.getppid() == raylet:  # it may have ended before the kernel was told
        signal.pause()


if __name__ == "__main__":
    main()

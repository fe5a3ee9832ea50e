"""What our processes ask of the system: to end with the one that started them, and about their memory."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from functools import cache
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent: int) -> None:
    """From now on the system kills this process when its parent ends: one that is busy would not notice by itself.

    parent: its process id, for it may have ended already; in a container it may well be 1, to which orphans go too.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it has ended already
        os._exit(0)


def resident_bytes() -> int:
    """Of this process; what `ps` calls RSS."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settle() -> None:
    """Once all is loaded that stays: the collector need not look at it again and again, and with little left to look at
    it soon finds what connections leave behind in circles.
    """
    gc.collect()
    gc.freeze()


@cache
def _trim() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries need none


def give_back_memory() -> None:
    """What was freed goes back to the system: prompts of every length leave holes of every size, which add up."""
    if (trim := _trim()) is not None:
        trim(0)

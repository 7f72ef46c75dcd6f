"""Memory that was freed: glibc gives large blocks back to the system, though a chain takes them again at once."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as mallopt(3) numbers them
# By which a user tells glibc the same.
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
LARGEST_BLOCK = 32 * 2**20  # bytes: the most that every glibc takes; a dataset is larger, and does go back
KEPT = 2**30  # bytes of free memory at the heap's end


def keep_freed_memory() -> bool:
    """Have malloc keep freed blocks of up to 32 MiB in this process; returns whether it does.

    Every step of a chain frees and takes the same megabytes. Given back to the system, they come again page by page:
    1,000 to 2,500 page faults a step at 32 pixels and batch 64 (docs/benchmarks.md). The largest resident set is the
    same. Other allocators, and whoever has set glibc's own variables, are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    malloc = ctypes.CDLL(None).mallopt
    return bool(malloc(_MMAP_THRESHOLD, LARGEST_BLOCK) and malloc(_TRIM_THRESHOLD, KEPT))

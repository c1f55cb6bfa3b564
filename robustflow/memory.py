"""Freed memory is kept: what makes large tensors cheap to allocate on a CPU."""

from __future__ import annotations

import ctypes

# mallopt(3): numbers of the parameters, from <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26}
# Where glibc's own defaults end up in a program that frees large blocks: the thresholds grow to their maximum.
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17}


def keep_freed_memory(keep: bool = True) -> bool:
    """Tell glibc's malloc to hold on to what is freed, or no longer to. Returns whether there was one that listened.

    By default every tensor above some megabytes is mapped when it is made and unmapped when it is freed, and the next
    one faults its pages in again, zeroed by the kernel, 4 kB at a time. The process then keeps its largest size until
    it ends. Other C libraries are left as they are.

    >>> isinstance(keep_freed_memory(), bool)
    True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(mallopt(*pair) == 1 for pair in (_KEEP if keep else _USUAL).items())

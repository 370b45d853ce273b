"""How the C library treats memory that tensors on the CPU give back."""

from __future__ import annotations

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = (1 << 30, 1 << 25)  # older ones refuse to keep blocks of more than 32 MB


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors; a no-op with another C library.

    A network on the CPU gives its activations back and takes as much again at every step. By
    default the pages go to the system and come back as page faults: a third of the time of a VAE
    that encodes at 256 px.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # setting only the second would end glibc's own adapting, which is worse than doing nothing
    for kept in _KEPT_BYTES:
        if mallopt(_M_MMAP_THRESHOLD, kept):
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES[0])
            return

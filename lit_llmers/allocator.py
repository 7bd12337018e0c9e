"""Memory that a training step frees is kept for the next one, instead of going back to the system each time."""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # glibc's malloc.h


def keep_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and not to shrink it. Returns whether there was a glibc to tell.

    By default every large tensor is mapped anew, and the kernel clears each of its pages at first touch, at every step.
    Nothing is computed differently; the process keeps the memory that it needed once, and with
    tensors of ever other sizes some more.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 << 20)])

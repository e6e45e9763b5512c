# SPDX-License-Identifier: Apache-2.0
"""What the memory allocators of this process have given out."""

import ctypes
import gc
import sys


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _MallInfo


def given_out() -> tuple[int, int]:
    """Bytes that malloc has given out, and blocks that Python's allocator has given out."""
    info = _mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def held() -> tuple[int, int]:
    """As ``given_out``, once garbage is collected."""
    gc.collect()
    return given_out()

"""Speech for frozen RWKV language models."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV

__all__ = ["SpeechRWKV"]

# On the CPU, oneDNN keeps what it compiled for the last 1024 shapes, and torch the same once more, 0.2 MB apiece; each
# new length of audio is 50 shapes. 256 hold what training steps and beam searches come back to; torch's own save no
# time. Nothing but the environment bounds them, and it is read at the first computation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")

# glibc gives blocks of 32 MiB and more, such as attention's, back to the system as soon as they are free, and the next
# one costs a page fault for each 4 KiB: a quarter of an encoder's time. Now those of up to 1 GiB are kept for the next.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    _libc = ctypes.CDLL(None)
    if hasattr(_libc, "mallopt"):  # not musl's
        _libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        _libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def __getattr__(name: str) -> Any:
    # Imported when it is used: Lightning takes seconds, which `--help` need not wait for.
    if name == "SpeechRWKV":
        from rwkv_speech.model import SpeechRWKV

        return SpeechRWKV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

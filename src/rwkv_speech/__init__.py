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
# one costs a page fault for each 4 KiB: a quarter of an encoder's time. Now the main thread keeps those of up to 1 GiB
# for the next. An older glibc refuses, and then keeps its own rules.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TOLD = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_tuned = any(name in os.environ for name in _TOLD) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
if sys.platform == "linux" and not _tuned:
    _libc = ctypes.CDLL(None)
    if hasattr(_libc, "mallopt") and _libc.mallopt(_M_MMAP_THRESHOLD, 2**30):  # musl has none
        _libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def __getattr__(name: str) -> Any:
    # Imported when it is used: Lightning takes seconds, which `--help` need not wait for.
    if name == "SpeechRWKV":
        from rwkv_speech.model import SpeechRWKV

        return SpeechRWKV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

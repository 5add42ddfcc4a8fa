"""Speech for frozen RWKV language models."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV

__all__ = ["SpeechRWKV"]

# On the CPU, oneDNN keeps what it compiled for the last 1024 shapes, and torch the same once more, 0.2 MB apiece; each
# new length of audio is 50 shapes. 256 hold what training steps and beam searches come back to; torch's own save no
# time. Nothing but the environment bounds them, and it is read at the first computation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def __getattr__(name: str) -> Any:
    # Imported when it is used: Lightning takes seconds, which `--help` need not wait for.
    if name == "SpeechRWKV":
        from rwkv_speech.model import SpeechRWKV

        return SpeechRWKV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Speech for frozen RWKV language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV

__all__ = ["SpeechRWKV"]


def __getattr__(name: str) -> Any:
    # Imported when it is used: Lightning takes seconds, which `--help` need not wait for.
    if name == "SpeechRWKV":
        from rwkv_speech.model import SpeechRWKV

        return SpeechRWKV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

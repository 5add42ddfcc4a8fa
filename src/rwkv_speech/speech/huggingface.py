"""The door to the transformers library: import it where torchaudio is broken, and load without its chatter."""

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@functools.cache
def import_transformers() -> ModuleType:
    """transformers, also beside a torchaudio that does not load.

    transformers imports torchaudio wherever it is installed and fails with it, although no encoder here needs it:
    torchaudio's compiled part refuses a torch without CUDA libraries, or with those of another version. Then
    torchaudio is hidden for as long as transformers looks for it.
    """
    import transformers

    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        available = transformers.utils.import_utils.is_torchaudio_available
        available.cache_clear()
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  # Python's own way to say "not importable"
        try:
            available()  # remembers the answer
            import transformers.audio_utils
        finally:
            del sys.modules["torchaudio"]
    # WavLM's attention, at its first batch; its users can do nothing about it.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from listing the weights that we leave out on purpose, and from its progress bars."""
    logging = import_transformers().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)

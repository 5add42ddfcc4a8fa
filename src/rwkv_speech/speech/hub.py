"""Where an encoder's files are: in a folder, or on the Hugging Face hub."""

import functools
import logging
import os
import re
from pathlib import Path

from rwkv_speech.errors import UserError

log = logging.getLogger("rwkv_speech")

NAME = re.compile(r"[a-z0-9_][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)  # one word is a folder, mistyped
_TIMEOUT = 5.0  # s


def encoder_folder(name: str) -> Path | None:
    """The folder that the name of an encoder stands for, absolute; None for a model of the Hugging Face hub.

    Raises:
        UserError: no such folder, nor in the form of the hub's names.
    """
    folder = os.path.abspath(os.path.expanduser(name))
    if os.path.isdir(folder):
        return Path(folder)
    if not NAME.fullmatch(name):
        raise UserError(f"speech encoder {name}: no such folder; expected one, or a Hugging Face model as OWNER/NAME")
    return None


@functools.cache
def hub_is_reachable() -> bool:
    """Asked once: the hub's library would try again for half a minute, with each file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # of any kind: the library's client is httpx or requests, and has a mode of being offline
        return False
    return True


def expect_on_hub(name: str) -> None:
    """Says that a model will be fetched, if there is no copy of it here.

    Raises:
        UserError: nor can it be fetched.
    """
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if not hub_is_reachable():
        raise UserError(
            f"speech encoder {name}: no such folder here, nor a copy of a Hugging Face model of this name, and the hub "
            "cannot be reached; expected a folder, or a network"
        )
    log.warning("fetching the speech encoder %s from the Hugging Face hub", name)

"""Missions on the Hugging Face hub: `OWNER/NAME` for a mission file."""

import logging
from pathlib import Path

from rwkv_speech.errors import UserError, reason
from rwkv_speech.speech.hub import NAME, hub_is_reachable

log = logging.getLogger("rwkv_speech")

# Weights and what describes them: nothing that could be run.
_FILES = ["rwkv-adapter*.pth", "rwkv-adapter*.json", "rwkv-adapter*/adapter_config.json", "rwkv-adapter*/*.safetensors"]


def is_on_hub(path: str | Path) -> bool:
    """Whether a path can only be a name of the hub: there is no such file."""
    return bool(NAME.fullmatch(str(path))) and not str(path).endswith(".pth") and not Path(path).exists()


def fetch_mission(name: str) -> Path:
    """The folder of a mission of the hub, fetched if need be; without a network, the copy that is here.

    Raises:
        UserError: neither can be had.
    """
    from huggingface_hub import snapshot_download

    online = hub_is_reachable()
    try:
        if online:
            log.info("looking for the mission %s on the Hugging Face hub", name)
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=not online))
    except Exception as error:  # of the library, of its client, of the disk
        why = reason(error) if online else "no copy of it is here, and the hub cannot be reached"
        raise UserError(f"--adapter {name}: no such file, and as a mission of the Hugging Face hub: {why}") from None

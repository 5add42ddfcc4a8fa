"""What a folder holds: one answer for prediction, noise and data."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from rwkv_speech.errors import UserError

log = logging.getLogger("rwkv_speech")

# By these a file is taken for audio, whether libsndfile reads it or ffmpeg does. Where one recording lies there in
# several formats, the first of these is read.
AUDIO_SUFFIXES = (
    *(".flac", ".wav", ".w64", ".rf64", ".aiff", ".aif", ".aifc", ".caf", ".au", ".snd", ".sph", ".wv", ".ape", ".tta"),
    *(".ogg", ".opus", ".oga", ".spx", ".mp3", ".mp2", ".m4a", ".m4b", ".aac", ".ac3", ".wma", ".amr", ".weba"),
    *(".webm", ".mp4", ".m4v", ".mov", ".mkv", ".mka", ".avi", ".wmv", ".flv", ".ogv", ".mpg", ".mpeg", ".3gp", ".3g2"),
)


def is_audio(name: str) -> bool:
    """Whether a file of this name is taken for audio."""
    return name.lower().endswith(AUDIO_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether it is no data, by its name: macOS leaves `._a.flac` beside `a.flac`, and `__MACOSX` in archives."""
    return name.startswith(".") or name == "__MACOSX"


def _refuse(folder: Path, error: OSError) -> None:
    raise UserError(f"{folder}: the folder can't be searched ({error.strerror})") from error


def entries(folder: Path, onerror: Callable[[Path, OSError], None] = _refuse) -> list[os.DirEntry[str]]:
    """What lies in a folder, in the order of names, without what is hidden.

    onerror: called where the folder can't be searched; nothing lies in it then.

    Raises:
        UserError: the folder can't be searched, and there is no other `onerror`.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        onerror(folder, error)
        return []


def folders(folder: Path, onerror: Callable[[Path, OSError], None] = _refuse) -> list[Path]:
    """The folders in a folder, links to some among them; as `entries`."""
    return [Path(entry.path) for entry in entries(folder, onerror) if os.path.isdir(entry.path)]


def audio_files(folder: Path) -> list[Path]:
    """The audio files of a folder and all below it, sorted; links to folders are followed, each folder once.

    One line of the log says what is left out. What can't be searched is among the files: opening it says why.
    """
    found, left_out = [], []
    waiting, links, seen = [Path(folder)], [], set()
    while waiting or links:
        place = waiting.pop() if waiting else links.pop()  # a folder itself before a link to it
        try:
            state = os.stat(place)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            held = sorted(os.listdir(place))
        except OSError:
            found.append(place)
            continue
        for name in held:
            path = place / name
            if is_hidden(name):
                left_out.append(path)
            elif os.path.isdir(path):
                (links if path.is_symlink() else waiting).append(path)
            else:
                (found if is_audio(name) else left_out).append(path)
    if left_out:
        some = ", ".join(str(path.relative_to(folder)) for path in left_out[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        log.info("%s: left out, being hidden or not audio by their names: %s%s", folder, some, more)
    return sorted(found)

"""What is asked of a model, and how it is scored: one file each, and its line here."""

import re

from rwkv_speech.errors import UserError
from rwkv_speech.missions.answer import Answer
from rwkv_speech.missions.converse import Converse
from rwkv_speech.missions.describe import Describe
from rwkv_speech.missions.label import Label
from rwkv_speech.missions.mission import Mission
from rwkv_speech.missions.transcribe import Transcribe
from rwkv_speech.missions.translate import Translate

MISSIONS: dict[str, Mission] = {
    mission.name: mission
    for mission in (
        Transcribe(),
        Translate(),
        Answer(),
        Label(),
        Describe(),
        Converse(),
    )
}  # fmt: skip

_OWN_NAME = re.compile(r"[\w-]+")


def get_mission(name: str) -> Mission:
    """The mission of a name, behind which there may be one of its own: `label`, `label/speaker`.

    Raises:
        UserError: there is none, or its own name couldn't be that of a folder.
    """
    kind, slash, own = name.partition("/")
    if kind not in MISSIONS:
        raise UserError(f"there is no mission {kind!r}; expected one of: {', '.join(MISSIONS)}")
    if slash and not _OWN_NAME.fullmatch(own):
        raise UserError(f"mission {name!r}: expected a name of letters, digits, '_' and '-' after the slash")
    return MISSIONS[kind]

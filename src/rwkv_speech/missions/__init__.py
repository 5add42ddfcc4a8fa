"""What is asked of a model, and how it is scored: one file each, and its line here."""

from rwkv_speech.errors import UserError
from rwkv_speech.missions.answer import Answer
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
    )
}  # fmt: skip


def get_mission(name: str) -> Mission:
    """The mission of this name.

    Raises:
        UserError: there is none.
    """
    if name not in MISSIONS:
        raise UserError(f"there is no mission {name!r}; expected one of: {', '.join(MISSIONS)}")
    return MISSIONS[name]

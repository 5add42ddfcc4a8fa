"""What is asked of a model, and how it is scored: one file each, and its line here."""

from rwkv_speech.errors import UserError
from rwkv_speech.missions.mission import Mission
from rwkv_speech.missions.transcribe import Transcribe

MISSIONS: dict[str, Mission] = {
    mission.name: mission
    for mission in (
        Transcribe(),
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

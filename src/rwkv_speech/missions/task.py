"""A mission as one model does it: with an initial state of its own, and what it learnt beside that."""

from dataclasses import dataclass, replace
from typing import Any

from rwkv_speech.data.sample import Row
from rwkv_speech.missions import get_mission
from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import EvalRecord


@dataclass
class Task:
    """One of the missions of a model.

    name: the mission's; where a model has several of a kind, with a name of its own behind it: `label/speaker`.
    labels: the texts that an answer is chosen from, where the mission chooses.
    trained_audio_s: the longest recording that it was trained on, in seconds, where its mission file says so.

    Raises:
        UserError: there is no such mission.
    """

    name: str
    labels: list[str] | None = None
    trained_audio_s: float | None = None

    def __post_init__(self) -> None:
        get_mission(self.name)

    @property
    def mission(self) -> Mission:
        return get_mission(self.name)

    def record(self, row: Row, hypothesis: str, **measured: Any) -> EvalRecord:
        """`Mission.record`, with the task's name."""
        return replace(self.mission.record(row, hypothesis, **measured), mission=self.name)

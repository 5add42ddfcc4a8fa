"""A sample as one sequence: token ids, the slots of audio embeddings, and labels.

    user audio, and text around it where there is some     no loss
    "#"                                                    its label is the first token of the answer
    answer                                                 each token's label is the next one, the last's end of text

and where the talk goes on, end of text, and the next round. Labels stand at the position whose output they judge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_speech.data.sample import Sample
from rwkv_speech.lm.tokenizer import END_OF_TEXT, Tokenizer

SEPARATOR_ID = 36  # "#", which stands between what is asked and the answer
NO_LABEL = -100  # where nothing is asked; what torch's cross-entropy ignores by default


@dataclass(slots=True)
class Rendered:
    """One sequence of T positions.

    ids: (T,) int64; END_OF_TEXT where audio goes.
    labels: (T,) int64, NO_LABEL wherever nothing is asked.
    audio_slots: (n,) int64, the positions of audio embeddings, in the order of the recordings.
    frames: encoder frames of each recording.
    answers: the positions of each answer's tokens; of the last one none, where it isn't known.
    """

    ids: Tensor
    labels: Tensor
    audio_slots: Tensor
    frames: list[int]
    answers: list[range]

    @property
    def prompt_length(self) -> int:
        """Positions up to the last "#", after which the last answer begins."""
        return self.answers[-1].start

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Renders samples for one model.

    tokenizer: the language model's.
    frame_count: samples of a recording at 16 kHz -> frames of the encoder.
    group_count: frames -> positions, as the adapter makes them.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, frame_count: Callable[[int], int], group_count: Callable[[int], int]
    ) -> None:
        self.tokenizer = tokenizer
        self.frame_count = frame_count
        self.group_count = group_count

    def __call__(self, sample: Sample, samples: Sequence[int]) -> Rendered:
        """The sequence of a sample whose recordings have so many samples at 16 kHz."""
        ids: list[int] = []
        labels: list[int] = []
        slots: list[range] = []
        frames = [self.frame_count(n) for n in samples]
        groups = (self.group_count(n) for n in frames)
        answers: list[range] = []
        for number, message in enumerate(sample.messages):
            if message.role == "assistant":
                answer = self.tokenizer.encode("".join(message.parts))
                answers.append(range(len(ids), len(ids) + len(answer)))
                ids += answer
                # A first answer has nothing before it that could be asked for its first token.
                labels[-1:] = [*answer, END_OF_TEXT][not labels :]
                if number + 1 < len(sample.messages):
                    ids.append(END_OF_TEXT)
                    labels.append(NO_LABEL)
                continue
            for part in message.parts:
                if isinstance(part, str):
                    ids += self.tokenizer.encode(part)
                else:
                    slots.append(range(len(ids), len(ids) + next(groups)))
                    ids += [END_OF_TEXT] * len(slots[-1])
            ids.append(SEPARATOR_ID)
            labels += [NO_LABEL] * (len(ids) - len(labels))
        if sample.messages[-1].role == "user":
            answers.append(range(len(ids), len(ids)))
        return Rendered(
            ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            audio_slots=torch.cat([torch.arange(slot.start, slot.stop) for slot in slots] or [torch.arange(0)]),
            frames=frames,
            answers=answers,
        )

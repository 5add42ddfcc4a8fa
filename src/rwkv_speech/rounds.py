"""Answers to samples of several rounds, one round after the other from the state of the one before."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.data.batches import Batch
from rwkv_speech.decoding import DecodingResult
from rwkv_speech.lm.language_model import last
from rwkv_speech.lm.state import State
from rwkv_speech.options import DecodingOptions

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV


@torch.no_grad()
def answer_rounds(
    model: "SpeechRWKV",
    batch: Batch,
    options: DecodingOptions = DecodingOptions(),
    audio_embeds: Tensor | None = None,
    *,
    references: bool = False,
) -> list[list[DecodingResult]]:
    """The answers to all rounds of each sample of a batch; batch and audio_embeds as for `SpeechRWKV.loss_sum`.

    references: earlier rounds have left in the state what their references are; else what the model itself answered,
        and an answer that was cut counts as if it had ended there.
    """
    if all(len(answers) == 1 for answers in batch.rounds):
        return [[result] for result in model.decode(batch, options, audio_embeds)]
    audio_embeds = model.embed_audio(batch)[0] if audio_embeds is None else audio_embeds
    x = model.embed(batch, audio_embeds)
    found: list[list[DecodingResult]] = [[] for _ in batch.names]
    places, state, which = list(range(len(batch))), None, model.which(batch)
    for number in range(max(map(len, batch.rounds))):
        going_on = [row for row, place in enumerate(places) if len(batch.rounds[place]) > number]
        if state is not None:
            state = _state_of(going_on, state, [found[places[row]][-1] for row in going_on], references)
        places = [places[row] for row in going_on]
        parts = [x[place, _asked(batch.rounds[place], number, references)] for place in places]
        lengths = torch.tensor([len(part) for part in parts], device=x.device)
        with torch.inference_mode():
            hidden, state = model.language_model(pad_sequence(parts, batch_first=True), state, lengths, which)
            hidden, which = last(hidden, lengths), None
        name = f"{{}} {number}" if number else "{}"
        results = model.answers(batch, places, hidden, state, options, name=name, keep_state=not references)
        for place, result in zip(places, results, strict=True):
            found[place].append(result)
    return found


def _asked(answers: Sequence[range], number: int, references: bool) -> slice:
    """The positions that are read before the answer to a round: from the end of the one before on, or its beginning."""
    before = answers[number - 1] if number else range(0)
    return slice(before.start if references else before.stop, answers[number].start)


def _state_of(rows: Sequence[int], asked: State, results: Sequence[DecodingResult], references: bool) -> State:
    """The state from which some rows of the last round go on; `asked` is that before their answers."""
    if not references:
        return State.cat([result.state for result in results])
    return asked.select(torch.tensor(rows, device=asked.layers[0].att_shift.device))

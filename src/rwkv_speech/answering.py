"""Answers to the samples of a batch, each as its mission has it: to what is asked last, or to round after round."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.data.batches import Batch
from rwkv_speech.decoding import DecodingResult, choose, complete
from rwkv_speech.errors import UserError
from rwkv_speech.lm.language_model import last
from rwkv_speech.lm.state import State
from rwkv_speech.options import DecodingOptions

if TYPE_CHECKING:
    from rwkv_speech.model import SpeechRWKV


def answers(
    model: "SpeechRWKV",
    batch: Batch,
    places: Sequence[int],
    hidden: Tensor,
    state: State,
    options: DecodingOptions,
    *,
    name: str = "{}",
    keep_state: bool = False,
) -> list[DecodingResult]:
    """The answers to some samples of a batch, from where the language model has read what they ask.

    Args:
        model: the model.
        batch: that the samples are in.
        places: where.
        hidden: (len(places), C), the language model's output there, and
        state: its state.
        options: as for `SpeechRWKV.decode`.
        name: what a sample is called, made of its name; draws at random depend on it.
        keep_state: gives the final state of each result that wasn't chosen from a set.

    Raises:
        UserError: a mission chooses among labels, and there are none.
    """
    groups: dict[str | None, list[int]] = {}  # rows of `hidden`: of a task that chooses, and all others together
    for row, place in enumerate(places):
        task = model.task(batch.missions[place])
        if task.mission.chooses and not task.labels:
            raise UserError(f"the mission {task.name} chooses among labels: name them by --labels")
        groups.setdefault(task.name if task.mission.chooses else None, []).append(row)
    results: dict[int, DecodingResult] = {}
    for chooses, rows in groups.items():
        index = torch.tensor(rows, device=hidden.device)
        start = (hidden[index], state.select(index)) if len(rows) < len(places) else (hidden, state)
        if chooses:
            labels = [*map(model.tokenizer.encode, model.tasks[chooses].labels)]
            found = choose(model.language_model, *start, labels)
        else:
            found = complete(
                *(model.language_model, *start),
                max_new_tokens=[_most_tokens(model, batch, places[row], options) for row in rows],
                options=options,
                names=[name.format(batch.names[places[row]]) for row in rows],
                keep_state=keep_state,
            )
        results |= zip(rows, found, strict=True)
    return [results[row] for row in range(len(places))]


def _most_tokens(model: "SpeechRWKV", batch: Batch, place: int, options: DecodingOptions) -> int:
    mission = model.task(batch.missions[place]).mission
    return options.max_new_tokens or mission.max_new_tokens(batch.seconds[place])


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
        and one that was cut counts as if it had ended there (with `loop_guard`, after the loop).
    """
    if all(len(rounds) == 1 for rounds in batch.rounds):
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
        results = answers(model, batch, places, hidden, state, options, name=name, keep_state=not references)
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

"""Answers from a frozen language model: greedy, beam and sampling over the recurrent state, from a state to a state.

Notable:
- What comes before the answer is read once, all samples together; from then on every token costs one step, of the same
  time and memory however long the audio and the answer are.
- One algorithm: greedy is the beam search of width 1, sampling is greedy with another choice.
- The hypotheses of all samples are rows of one batch; those that are done leave it.
- Logits are computed at the last position of each running hypothesis and nowhere else.
"""

import heapq
import itertools
import math
import zlib
from collections.abc import Container, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.lm.language_model import LanguageModel, last
from rwkv_speech.lm.state import State
from rwkv_speech.lm.tokenizer import END_OF_TEXT
from rwkv_speech.options import DecodingOptions

# People do say "no no no no", a row of equal digits, or a chorus three times. Four times the same sentence, 48 times
# the same token (where tokens are bytes, 12 times "one ") is a decoder that is stuck.
LOOP_PERIOD = 32  # tokens, the longest that is looked for
LOOP_REPETITIONS = 4  # at least, and
LOOP_TOKENS = 48  # at least, all repetitions together

SCORED_ROWS = 64  # rows of `score_answers` that are held at once: each has a state and a distribution per token


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """One answer, as tokens.

    Attributes:
        tokens: without the end of text.
        score: sum of the natural log-probabilities of the tokens, and of the end of text where it was reached.
        finished: the end of text was reached; False: cut, by the limit or as a loop.
        loop: at some point the answer repeated itself, as `repeats` defines it.
        probability: of an answer that was chosen from a set, among those in it.
        alternatives: of a beam search, the next best answers, best first.
        state: where it is asked for, the state (of a batch of 1) after all tokens that were generated, also those that
            were cut as a loop. The end of text has not been read.
    """

    tokens: list[int]
    score: float
    finished: bool
    loop: bool
    probability: float | None = None
    alternatives: tuple["DecodingResult", ...] = ()
    state: State | None = field(default=None, repr=False, compare=False)

    @property
    def n_scored(self) -> int:
        """Tokens that `score` sums over: those of the answer, and the end of text where it was reached."""
        return len(self.tokens) + self.finished

    @property
    def average_log_prob(self) -> float:
        """`score` per token that it sums over."""
        return self.score / self.n_scored


def decode(
    model: LanguageModel,
    embeddings: Tensor,
    lengths: Tensor,
    state: State | None = None,
    *,
    max_new_tokens: Sequence[int],
    options: DecodingOptions = DecodingOptions(),
    names: Sequence[str] = (),
    end: int = END_OF_TEXT,
    keep_state: bool = False,
) -> list[DecodingResult]:
    """The best answer of each sample after its prompt.

    Each step keeps the hypotheses with the largest sums of log-probabilities. One that ends keeps its place among the
    `options.beam`, so that the search narrows until it is over; width 1 is greedy. Those done are ranked by
    score / n_scored**length_penalty, and any that looped behind all that did not: a model in a loop is all but certain
    of each further token, so that loops would win by their length.

    Args:
        model: the language model.
        embeddings: (B, T, C), padded on the right with anything: all of a sample that comes before its answer.
        lengths: (B,) integers in 1..T, valid positions of each.
        state: what came before; None is the model's initial state.
        max_new_tokens: B limits, each at least 1, on the tokens of a hypothesis, its end of text included.
        options: how to search. With `loop_guard` a loop is cut where it is noticed, after the first copy of what it
            repeats; else it is only reported.
        names: B names; what sampling draws depends on the seed and these alone. Without: the places in the batch.
        end: the token that ends an answer; with one outside the vocabulary, like -1, all run to the limit.
        keep_state: gives the final state of each result.

    Returns:
        B results, in the order of the samples.

    Raises:
        ValueError: limits that don't fit.
        UserError: the model's output is not finite.
    """
    with torch.inference_mode():
        hidden, state = model(embeddings, state, lengths)
        hidden = last(hidden, lengths)
    return complete(
        *(model, hidden, state),
        max_new_tokens=max_new_tokens,
        options=options,
        names=names,
        end=end,
        keep_state=keep_state,
    )


def complete(model: LanguageModel, hidden: Tensor, state: State, **how: Any) -> list[DecodingResult]:
    """What `generate` comes to, with the same arguments; no final states, unless asked for."""
    steps = generate(model, hidden, state, stream=False, **{"keep_state": False} | how)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


@torch.inference_mode()
def generate(
    model: LanguageModel,
    hidden: Tensor,
    state: State,
    *,
    max_new_tokens: Sequence[int],
    options: DecodingOptions = DecodingOptions(),
    names: Sequence[str] = (),
    end: int = END_OF_TEXT,
    keep_state: bool = True,
    stream: bool = True,
) -> Generator[list[tuple[int, int]], None, list[DecodingResult]]:
    """Answers from a state on, token by token; the arguments are those of `decode`, but for

    Args:
        hidden: (B, C), the model's output at the last position before the answer.
        state: the state there.
        stream: whether to find out which tokens are decided; without, nothing is in what it yields.

    Yields:
        After each step, pairs of a sample's place and a token of its answer that can't change any more, in order: of a
        beam search, what all hypotheses agree on. (A loop that `loop_guard` cuts has been yielded before.)

    Returns:
        The results, as `decode` gives them.
    """
    if len(max_new_tokens) != len(hidden) or min(max_new_tokens) < 1:
        raise ValueError(f"decode: expected {len(hidden)} limits of at least 1 token, not {list(max_new_tokens)}")
    keys = names or [str(i) for i in range(len(hidden))]
    searches = [Search(limit, options, key, end) for limit, key in zip(max_new_tokens, keys, strict=True)]
    rows = Rows(model, keep_state=keep_state)
    rows.join(hidden, state, searches)
    while rows.running:
        rows.step()
        yield [(i, token) for i, search in enumerate(searches) for token in search.newly_decided()] if stream else []
    return [search.result() for search in searches]


class Rows:
    """The hypotheses of running searches as the rows of one batch; searches may join at any step.

    keep_state: gives the final state of each result.
    """

    def __init__(self, model: LanguageModel, *, keep_state: bool = False) -> None:
        self.model, self.keep_state = model, keep_state
        self.running: list[Search] = []  # row by row, the batch holds the live hypotheses of these
        self._hidden: Tensor | None = None  # (rows, C), where a search has joined and not yet stepped
        self._state: State | None = None

    @torch.inference_mode()
    def join(self, hidden: Tensor, state: State, searches: "Sequence[Search]") -> None:
        """Lets new searches take part in the next step: hidden (searches, C) and the state as `generate` takes them."""
        if self.running:
            self._read()
            hidden, state = torch.cat([self._hidden, hidden]), State.cat([self._state, state])
        self.running = [*self.running, *searches]
        self._hidden, self._state = hidden, state

    def drop(self, searches: "Container[Search]") -> None:
        """Takes out searches before they are over."""
        stays = [search not in searches for search in self.running for _ in search.live]
        self.running = [search for search in self.running if search not in searches]
        if self.running:
            rows = torch.tensor(stays).nonzero()[:, 0].to(self._state.layers[0].att_shift.device)
            self._state = self._state.select(rows)
            self._hidden = None if self._hidden is None else self._hidden[rows]

    @torch.inference_mode()
    def step(self) -> None:
        """One token more for each search; those that are over with it have left.

        Raises:
            UserError: the model's output is not finite.
        """
        self._read()
        log_probs = torch.log_softmax(self.model.logits(self._hidden).float(), dim=-1)  # (rows, vocabulary)
        candidates = _candidates(log_probs, self.running, self.model)
        row, parents = 0, []
        for search in self.running:
            rows = len(search.live)
            parents += [row + parent for parent in search.step(candidates[row : row + rows])]
            if self.keep_state:
                search.keep_states(self.model, self._state, row)
            row += rows
        self.running = [search for search in self.running if search.live]
        if self.running and parents != list(range(row)):
            self._state = self._state.select(torch.tensor(parents, device=log_probs.device))
        self._hidden = None

    def _read(self) -> None:
        """Has the model read the last token of each hypothesis, where it has not."""
        if self._hidden is None:
            tokens = [hypothesis.tokens[-1] for search in self.running for hypothesis in search.live]
            tokens = torch.tensor(tokens, device=self._state.layers[0].att_shift.device)
            hidden, self._state = self.model(tokens[:, None], self._state)
            self._hidden = hidden[:, -1]  # (rows, C)


@torch.inference_mode()
def score_answers(
    model: LanguageModel, hidden: Tensor, state: State, answers: Sequence[Sequence[int]], *, end: int = END_OF_TEXT
) -> Tensor:
    """How likely each of a set of answers is, after each of B prompts.

    Args:
        model: the language model.
        hidden: (B, C), its output at the last position before the answer.
        state: the state there.
        answers: A rows of tokens, without the end of text.
        end: the token that ends an answer.

    Returns:
        (B, A) fp32, the sums of the natural log-probabilities of an answer's tokens and of the end of text.

    Raises:
        UserError: the model's output is not finite.
    """
    device, longest = hidden.device, max(map(len, answers))
    targets = torch.full((len(answers), longest + 1), end, device=device)
    for row, answer in zip(targets, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer, device=device)
    counts = torch.tensor([len(answer) + 1 for answer in answers], device=device)  # with the end of text
    pairs = torch.cartesian_prod(torch.arange(len(hidden), device=device), torch.arange(len(answers), device=device))
    scores = []
    for samples, chosen in (pair.unbind(1) for pair in pairs.split(SCORED_ROWS)):
        outputs = hidden[samples, None]  # (rows, 1, C)
        if longest:
            more, _ = model(targets[chosen, :-1], state.select(samples))
            outputs = torch.cat([outputs, more], dim=1)  # (rows, longest + 1, C)
        log_probs = torch.log_softmax(model.logits(outputs).float(), dim=-1)
        of_target = log_probs.gather(2, targets[chosen, :, None])[..., 0]
        within = torch.arange(longest + 1, device=device) < counts[chosen, None]
        scores.append(of_target.where(within, 0.0).sum(1))
    scores = torch.cat(scores)
    _check_finite(scores.tolist(), model)
    return scores.view(len(hidden), len(answers))


@torch.inference_mode()
def choose(
    model: LanguageModel, hidden: Tensor, state: State, answers: Sequence[Sequence[int]]
) -> list[DecodingResult]:
    """The likeliest of a set of answers after each prompt, and all others as its alternatives.

    Answers are ranked by their average log-probability per token, end of text included. The sum would favour short ones
    as long as the model isn't sure: of labels of 4 to 14 bytes it chose 5 to 15 of 100 more wrongly, and of labels of
    like length it was no better. For probabilities that are right as often as they say, averages are multiplied by the
    square root of the answers' mean length before the softmax.

    The arguments are those of `score_answers`.
    """
    scores = score_answers(model, hidden, state, answers)
    counts = torch.tensor([len(answer) + 1.0 for answer in answers], device=scores.device)
    probabilities = (scores / counts * counts.mean().sqrt()).softmax(1)
    results = []
    for found in zip(scores.tolist(), probabilities.tolist(), strict=True):
        ranked = sorted(zip(*found, answers, strict=True), key=lambda x: -x[1])
        best, *others = (
            DecodingResult(tokens=list(tokens), score=score, finished=True, loop=False, probability=probability)
            for score, probability, tokens in ranked
        )
        results.append(replace(best, alternatives=tuple(others)))
    return results


def _candidates(
    log_probs: Tensor, running: Sequence["Search"], model: LanguageModel
) -> list[tuple[list[float], list[int]]]:
    """Of each row (vocabulary,), log-probabilities and ids of the tokens that its hypothesis may go on with."""
    candidates, row = [], 0
    for options, searches in itertools.groupby(running, key=attrgetter("options")):
        drawn = [search.random.random() if options.temperature else 0.0 for search in searches for _ in search.live]
        values, tokens = _next_tokens(log_probs[row : row + len(drawn)], options, drawn)
        candidates += zip(values.tolist(), tokens.tolist(), strict=True)
        row += len(drawn)
    _check_finite((value for row, _ in candidates for value in row), model)
    return candidates


def _next_tokens(log_probs: Tensor, options: DecodingOptions, drawn: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The best of each row, (rows, beam), or the ones that random numbers from 0 to 1 stand for, (rows, 1)."""
    if not options.temperature:
        # No hypothesis can contribute more than `beam` tokens to the best of all.
        return log_probs.topk(min(options.beam, log_probs.shape[-1]))
    probs, order = (log_probs / options.temperature).softmax(-1).sort(dim=-1, descending=True)
    total = probs.cumsum(-1)
    # The smallest set of the likeliest tokens that reaches top_p, and a place in it by its share.
    kept = (total < options.top_p).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    share = torch.tensor(drawn, device=log_probs.device)[:, None] * total.gather(-1, kept)
    tokens = order.gather(-1, (total <= share).sum(-1, keepdim=True).minimum(kept))
    return log_probs.gather(-1, tokens), tokens


def _check_finite(log_probs: Iterator[float] | Sequence[float], model: LanguageModel) -> None:
    if not all(map(math.isfinite, log_probs)):
        model.check_weights()
        raise UserError(
            "the language model's output is not finite: its numbers leave the range of the precision, or its state "
            "or the adapter are spoilt; try --precision bf16 or fp32"
        )


def repeats(tokens: Sequence[int]) -> int:
    """How many tokens at the end only say again what stands right before them; 0 where that is no loop.

    It is a loop when at least the last LOOP_TOKENS tokens are one period of up to LOOP_PERIOD tokens, at least
    LOOP_REPETITIONS times over. Meant to be asked after each new token, it looks no further back than that: without
    the tokens that it counts when it first finds the loop, the period stands there once.
    """
    for period in range(1, LOOP_PERIOD + 1):
        least = max(LOOP_TOKENS, LOOP_REPETITIONS * period)
        if len(tokens) < least:
            return 0
        if tokens[-1] == tokens[-1 - period] and tokens[-least:-period] == tokens[period - least :]:
            return least - period
    return 0


@dataclass(frozen=True)
class _Hypothesis:
    """An answer that is still growing."""

    tokens: list[int]
    scores: list[float]  # of the tokens up to each, and that: sums of log-probabilities
    loop: bool


class Search:
    """The search for one answer; it knows tokens and scores, and nothing of the model. Arguments as for `decode`.

    options: how to search.
    live: the hypotheses still running, best first.
    random: what sampling draws from.
    """

    def __init__(self, limit: int, options: DecodingOptions, name: str, end: int) -> None:
        self._limit, self.options, self._end = limit, options, end
        self.live = [_Hypothesis([], [], loop=False)]
        self.random = np.random.default_rng([options.sampling_seed, zlib.crc32(name.encode())])
        self._done: list[DecodingResult] = []
        self._ended: list[tuple[int, int, int | None]] = []  # in this step: place in _done, parent, token not yet read
        self._decided = 0

    def step(self, candidates: Sequence[tuple[Sequence[float], Sequence[int]]]) -> list[int]:
        """One token further: takes log-probabilities and ids of the best next tokens of each live hypothesis.

        Returns, for each hypothesis that is live now, the position that its parent had in `live` before.
        """
        extended = (
            ((parent.scores[-1] if parent.scores else 0.0) + log_prob, index, token)
            for index, (parent, (log_probs, tokens)) in enumerate(zip(self.live, candidates, strict=True))
            for log_prob, token in zip(log_probs, tokens, strict=True)
        )
        places = self.options.beam - len(self._done)
        parents, live = [], []
        self._ended = []
        for score, index, token in heapq.nlargest(places, extended, key=itemgetter(0)):
            hypothesis = self._extend(index, token, score)
            if hypothesis is not None:
                live.append(hypothesis)
                parents.append(index)
        self.live = live
        if self._is_decided():
            self.live, parents = [], []
        return parents

    def result(self) -> DecodingResult:
        best, *others = self._ranked()[: self.options.n_best]
        return replace(best, alternatives=tuple(others))

    def keep_states(self, model: LanguageModel, state: State, first_row: int) -> None:
        """Gives the hypotheses that ended in this step their states; `state` has a row for each live one before it."""
        for place, parent, token in self._ended:
            kept = state.select(torch.tensor([first_row + parent], device=state.layers[0].att_shift.device))
            if token is not None:
                _, kept = model(torch.tensor([[token]], device=kept.layers[0].att_shift.device), kept)
            self._done[place] = replace(self._done[place], state=kept)

    def newly_decided(self) -> list[int]:
        """Tokens that all hypotheses have come to agree on, and that no earlier call has given."""
        all_tokens = [x.tokens for x in (*self.live, *self._done)] if self.live else [self.result().tokens]
        agreed = all_tokens[0][self._decided :]
        for tokens in all_tokens[1:]:
            same = (x == y for x, y in zip(agreed, tokens[self._decided :], strict=False))
            ends = max(0, len(tokens) - self._decided)
            agreed = agreed[: next((i for i, equal in enumerate(same) if not equal), ends)]
        self._decided += len(agreed)
        return agreed

    def _extend(self, index: int, token: int, score: float) -> _Hypothesis | None:
        """The live hypothesis of this index with one more token; None where it is done with that."""
        parent = self.live[index]
        if token == self._end:
            self._ended.append((len(self._done), index, None))
            self._done.append(DecodingResult(tokens=parent.tokens, score=score, finished=True, loop=parent.loop))
            return None
        tokens, scores = [*parent.tokens, token], [*parent.scores, score]
        surplus = repeats(tokens)
        loop = parent.loop or surplus > 0
        if surplus and self.options.loop_guard:
            del tokens[-surplus:], scores[-surplus:]
        elif len(tokens) < self._limit:
            return _Hypothesis(tokens, scores, loop)
        self._ended.append((len(self._done), index, token))
        self._done.append(DecodingResult(tokens=tokens, score=scores[-1], finished=False, loop=loop))
        return None

    def _ranked(self) -> list[DecodingResult]:
        return sorted(self._done, key=lambda x: self._rank(x.loop, x.score, x.n_scored))

    def _rank(self, loop: bool, score: float, n_scored: int) -> tuple[bool, float]:
        return loop, -score / n_scored**self.options.length_penalty

    def _is_decided(self) -> bool:
        """No live hypothesis can get among the n best any more.

        Log-probabilities are at most 0, so that a score can only fall. And as it is negative, the length that serves it
        best is the limit. So what the best live hypothesis would be with all its tokens to come certain, up to the
        limit, is a bound for it and all the others.
        """
        if not self.live or len(self._done) < self.options.n_best:
            return False
        nth = self._ranked()[self.options.n_best - 1]
        bound = self._rank(False, self.live[0].scores[-1], self._limit)
        return self._rank(nth.loop, nth.score, nth.n_scored) <= bound

"""From a batch of prefixes to transcripts: greedy and beam search over the recurrent state.

Notable:
- The prefix is run once per utterance, all utterances together; from then on every token costs one step, of the same
  time and memory however long the audio and the transcript are.
- One algorithm: greedy is the beam search of width 1.
- The hypotheses of all utterances are rows of one batch; those that are done leave it.
- Logits are computed at the last position of each running hypothesis and nowhere else.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from rwkv_speech.lm.rwkv6 import RWKV6, last
from rwkv_speech.lm.tokenizer import END_OF_TEXT

# Several times what fast speech needs, so that only a run-away meets the limit.
LEAST_LIMIT = 100  # tokens
TOKENS_PER_SECOND = 50

# People do say "no no no no", a row of equal digits, or a chorus three times. Four times the same sentence, 48 times
# the same token (where tokens are bytes, 12 times "one ") is a decoder that is stuck.
LOOP_PERIOD = 32  # tokens, the longest that is looked for
LOOP_REPETITIONS = 4  # at least, and
LOOP_TOKENS = 48  # at least, all repetitions together


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """One transcript, as tokens.

    Attributes:
        tokens: without the end of text.
        score: sum of the natural log-probabilities of the tokens, and of the end of text where it was reached.
        finished: the end of text was reached; False: cut, by the limit or as a loop.
        loop: at some point the transcript repeated itself, as `repeats` defines it.
        alternatives: of a beam search, the next best transcripts, best first.
    """

    tokens: list[int]
    score: float
    finished: bool
    loop: bool
    alternatives: tuple["DecodingResult", ...] = ()

    @property
    def n_scored(self) -> int:
        """Tokens that `score` sums over: those of the transcript, and the end of text where it was reached."""
        return len(self.tokens) + self.finished

    @property
    def average_log_prob(self) -> float:
        """`score` per token that it sums over."""
        return self.score / self.n_scored


@torch.inference_mode()
def decode(
    model: RWKV6,
    embeddings: Tensor,
    lengths: Tensor,
    *,
    max_new_tokens: Sequence[int],
    beam: int = 1,
    n_best: int = 1,
    length_penalty: float = 1.0,
    loop_guard: bool = False,
    end: int = END_OF_TEXT,
) -> list[DecodingResult]:
    """The best transcript of each utterance, after its prefix and, before that, the model's initial state.

    Each step keeps the hypotheses with the largest sums of log-probabilities. One that ends keeps its place among the
    `beam`, so that the search narrows until it is over; width 1 is greedy. Those done are ranked by
    score / n_scored**length_penalty, and any that looped behind all that did not: a model in a loop is all but certain
    of each further token, so that loops would win by their length.

    Args:
        model: the language model.
        embeddings: (B, T, C), padded on the right with anything: all of a sample that comes before its transcript.
        lengths: (B,) integers in 1..T, valid positions of each.
        max_new_tokens: B limits, each at least 1, on the tokens of a hypothesis, its end of text included.
        beam: hypotheses per utterance.
        n_best: transcripts to return per utterance, the best one and its alternatives; at most `beam`.
        length_penalty: exponent of the length in the ranking, at least 0: 0 ranks by probability, which favours short
            transcripts, 1 by the average per token.
        loop_guard: cut a loop where it is noticed, after the first copy of what it repeats; else it is only reported.
        end: the token that ends a transcript; with one outside the vocabulary, like -1, all run to the limit.

    Returns:
        B results, in the order of the utterances.

    Raises:
        ValueError: an argument out of its range.
    """
    _check(embeddings, max_new_tokens, beam, n_best, length_penalty)
    searches = [_Search(limit, beam, n_best, length_penalty, loop_guard, end) for limit in max_new_tokens]
    running = searches  # row by row, the batch holds the live hypotheses of these
    hidden, state = model(embeddings, lengths=lengths)
    hidden = last(hidden, lengths)  # (B, C)
    while True:
        log_probs = torch.log_softmax(model.logits(hidden).float(), dim=-1)  # (rows, vocabulary)
        # No hypothesis can contribute more than `beam` tokens to the best of all.
        best = log_probs.topk(min(beam, log_probs.shape[-1]))
        candidates = list(zip(best.values.tolist(), best.indices.tolist(), strict=True))
        row, parents = 0, []
        for search in running:
            rows = len(search.live)
            parents += [row + parent for parent in search.step(candidates[row : row + rows])]
            row += rows
        running = [search for search in running if search.live]
        if not running:
            return [search.result() for search in searches]
        if parents != list(range(row)):
            state = state.select(torch.tensor(parents, device=hidden.device))
        tokens = [hypothesis.tokens[-1] for search in running for hypothesis in search.live]
        hidden, state = model(torch.tensor(tokens, device=hidden.device)[:, None], state)
        hidden = hidden[:, -1]  # (rows, C)


def default_max_new_tokens(seconds: float) -> int:
    """The limit for audio of so many seconds: 50 tokens per second, and at least 100."""
    return max(LEAST_LIMIT, math.ceil(TOKENS_PER_SECOND * seconds))


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
    """A transcript that is still growing."""

    tokens: list[int]
    scores: list[float]  # of the tokens up to each, and that: sums of log-probabilities
    loop: bool


class _Search:
    """The beam search of one utterance; the model is somebody else's business.

    `live` are the hypotheses still running, best first.
    """

    def __init__(self, limit: int, beam: int, n_best: int, length_penalty: float, loop_guard: bool, end: int) -> None:
        self._limit, self._beam, self._n_best = limit, beam, n_best
        self._length_penalty, self._loop_guard, self._end = length_penalty, loop_guard, end
        self.live = [_Hypothesis([], [], loop=False)]
        self._done: list[DecodingResult] = []

    def step(self, candidates: Sequence[tuple[Sequence[float], Sequence[int]]]) -> list[int]:
        """One token further: takes log-probabilities and ids of the best next tokens of each live hypothesis.

        Returns, for each hypothesis that is live now, the position that its parent had in `live` before.
        """
        extended = (
            ((parent.scores[-1] if parent.scores else 0.0) + log_prob, index, token)
            for index, (parent, (log_probs, tokens)) in enumerate(zip(self.live, candidates, strict=True))
            for log_prob, token in zip(log_probs, tokens, strict=True)
        )
        places = self._beam - len(self._done)
        parents, live = [], []
        for score, index, token in heapq.nlargest(places, extended, key=itemgetter(0)):
            hypothesis = self._extend(self.live[index], token, score)
            if hypothesis is not None:
                live.append(hypothesis)
                parents.append(index)
        self.live = live
        if self._is_decided():
            self.live, parents = [], []
        return parents

    def result(self) -> DecodingResult:
        best, *others = self._ranked()[: self._n_best]
        return replace(best, alternatives=tuple(others))

    def _extend(self, parent: _Hypothesis, token: int, score: float) -> _Hypothesis | None:
        """The hypothesis with one more token; None where it is done with that."""
        if token == self._end:
            self._done.append(DecodingResult(tokens=parent.tokens, score=score, finished=True, loop=parent.loop))
            return None
        tokens, scores = [*parent.tokens, token], [*parent.scores, score]
        surplus = repeats(tokens)
        loop = parent.loop or surplus > 0
        if surplus and self._loop_guard:
            del tokens[-surplus:], scores[-surplus:]
        elif len(tokens) < self._limit:
            return _Hypothesis(tokens, scores, loop)
        self._done.append(DecodingResult(tokens=tokens, score=scores[-1], finished=False, loop=loop))
        return None

    def _ranked(self) -> list[DecodingResult]:
        return sorted(self._done, key=lambda x: self._rank(x.loop, x.score, x.n_scored))

    def _rank(self, loop: bool, score: float, n_scored: int) -> tuple[bool, float]:
        return loop, -score / n_scored**self._length_penalty

    def _is_decided(self) -> bool:
        """No live hypothesis can get among the n best any more.

        Log-probabilities are at most 0, so that a score can only fall. And as it is negative, the length that serves it
        best is the limit. So what the best live hypothesis would be with all its tokens to come certain, up to the
        limit, is a bound for it and all the others.
        """
        if not self.live or len(self._done) < self._n_best:
            return False
        nth = self._ranked()[self._n_best - 1]
        bound = self._rank(False, self.live[0].scores[-1], self._limit)
        return self._rank(nth.loop, nth.score, nth.n_scored) <= bound


def _check(embeddings: Tensor, max_new_tokens: Sequence[int], beam: int, n_best: int, length_penalty: float) -> None:
    if len(max_new_tokens) != len(embeddings) or min(max_new_tokens) < 1:
        raise ValueError(f"decode: expected {len(embeddings)} limits of at least 1 token, not {list(max_new_tokens)}")
    if not 1 <= n_best <= beam:
        raise ValueError(f"decode: expected 1 <= n_best <= beam, not n_best = {n_best}, beam = {beam}")
    if length_penalty < 0:
        raise ValueError(f"decode: length_penalty must be at least 0, not {length_penalty}")

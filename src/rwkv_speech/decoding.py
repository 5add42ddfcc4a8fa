"""From a batch of prefixes to transcripts: greedy and beam search over the recurrent state.

Notable:
- The prefix is run once per utterance, all utterances together; from then on each token costs one step, of the same
  time and memory however long the audio and the transcript are.
- One algorithm: greedy is the beam search of width 1.
- The beams of all utterances are rows of one batch; those that are done leave it.
- Logits are computed at the last position of each running hypothesis and nowhere else.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from rwkv_speech.rwkv6.model import RWKV6, last
from rwkv_speech.rwkv6.tokenizer import END_OF_TEXT

LEAST_LIMIT = 100  # tokens
TOKENS_PER_SECOND = 50  # some ten times what the fastest speakers need, so that only a run-away meets the limit

# A loop is what a transcript ends in when up to LOOP_PERIOD tokens stand there at least LOOP_REPETITIONS times and
# fill at least LOOP_TOKENS. People do say "no no no no", a row of equal digits, or a chorus three times; 48 times one
# token (12 times "one " where tokens are single bytes) or the same sentence four times is a decoder that is stuck.
LOOP_PERIOD = 32
LOOP_REPETITIONS = 4
LOOP_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One transcript, as tokens.

    Attributes:
        tokens: without the end of text.
        score: sum of the natural log-probabilities of the tokens, and of the end of text where it was reached.
        finished: the end of text was reached; False: cut, by the limit or as a loop.
        loop: somewhere on the way the transcript repeated itself as `repeats` defines it.
        alternatives: of a beam search, the next best transcripts, best first.
    """

    tokens: list[int]
    score: float
    finished: bool
    loop: bool
    alternatives: tuple["Decoded", ...] = ()

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
) -> list[Decoded]:
    """The best transcript of each utterance, from the model's initial state and the utterance's prefix.

    The search keeps the `beam` hypotheses with the largest sums of log-probabilities, step by step; one that ends
    keeps its place, so that the search narrows and ends by itself (Bahdanau et al. 2015, arXiv:1409.0473, decode so).
    Width 1 is greedy. What is then done is ranked by score / n_scored**length_penalty, what looped behind what did not:
    a loop is all but certain of each further token, and would win by its length.

    Args:
        model: the language model.
        embeddings: (B, T, C), padded on the right with anything: all of a sample that comes before its transcript.
        lengths: (B,) integers in 1..T, valid positions of each.
        max_new_tokens: B limits of at least 1, for the tokens of a hypothesis with its end of text.
        beam: hypotheses kept per utterance.
        n_best: how many to return per utterance, of at most `beam`: the best one and its alternatives.
        length_penalty: exponent of the length in the ranking, >= 0. 0 ranks by probability and so favours short
            transcripts, 1 by the average per token.
        loop_guard: cut a loop as soon as it is seen, behind the first of what it repeats; else it is only reported.
        end: the token that ends a transcript; one that is not in the vocabulary, like -1, lets all run to the limit.

    Returns:
        B results, in the order of the utterances.

    Raises:
        ValueError: a number out of these ranges.
    """
    _check(embeddings, max_new_tokens, beam, n_best, length_penalty)
    width = min(beam, model.sizes.vocab_size)  # more candidates than this no hypothesis has
    searches = [
        _Search(limit=limit, beam=beam, n_best=n_best, length_penalty=length_penalty, loop_guard=loop_guard, end=end)
        for limit in max_new_tokens
    ]
    running = searches  # the rows of the batch are the live hypotheses of these, in order
    hidden, state = model(embeddings, lengths=lengths)
    hidden = last(hidden, lengths)  # (B, C)
    while True:
        log_probs = torch.log_softmax(model.logits(hidden).float(), dim=-1)  # (rows, vocabulary)
        candidates = zip(*(x.tolist() for x in log_probs.topk(width)), strict=True)
        for search in running:
            search.step([next(candidates) for _ in search.live])
        parents, row = [], 0
        ...

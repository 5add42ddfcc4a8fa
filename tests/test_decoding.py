"""Decoding against plain loops that run the whole sequence again for every token, and against enumeration."""

import itertools
import math
from functools import cache

import pytest
import torch

import rwkv_speech.decoding
from rwkv_speech.decoding import choose, generate, repeats, score_answers
from rwkv_speech.errors import UserError
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.language_model import last
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.options import DecodingOptions

END = 0
POSITIONS = (2, 401, 57, 151, 5, 31, 16, 230, 9, 77, 3, 301)  # audio of 0.1 s to 40 s, 10 positions a second, and "#"


ARGUMENTS = ("max_new_tokens", "names", "end", "keep_state")


def decode(model, *inputs, **how):
    """`decode` with the fields of `DecodingOptions` given one by one."""
    arguments = {name: how.pop(name) for name in ARGUMENTS if name in how}
    return rwkv_speech.decoding.decode(model, *inputs, options=DecodingOptions(**how), **arguments)


@cache
def random_model(vocab_size, seed, n_embd=64, head_size=32):
    """Of a small vocabulary: any token, the end of text too, is the best one now and then."""
    sizes = official_sizes(n_layer=2, n_embd=n_embd, vocab_size=vocab_size, head_size=head_size)
    model = RWKV6(sizes)
    model.load_state_dict(random_weights(sizes, seed=seed, time_state=True))
    return model


@cache
def constant_model(**probabilities):
    """The next token has these probabilities whatever came before: t7=0.9 for token 7; the rest is equally likely."""
    model = RWKV6(official_sizes(n_layer=1, n_embd=64, vocab_size=17, head_size=32))
    model.load_state_dict(random_weights(model.sizes, seed=0, time_state=True))
    given = {int(name[1:]): p for name, p in probabilities.items()}
    rest = (1 - sum(given.values())) / (17 - len(given))
    model.ln_out.weight.zero_()
    model.ln_out.bias.zero_()[0] = 1
    model.head.weight[:, 0] = torch.tensor([given.get(i, rest) for i in range(17)]).log()
    return model


def batch(lengths, n_embd=64, seed=1):
    """Prefixes (B, T, C) with something large in the padding, and their lengths."""
    embeddings = torch.randn(len(lengths), max(lengths), n_embd, generator=torch.Generator().manual_seed(seed))
    for row, length in zip(embeddings, lengths, strict=True):
        row[length:] = 1000
    return embeddings, torch.tensor(lengths)


def log_probs_by_full_pass(model, prefix, sequences):
    """prefix (T, C), n sequences of one length L -> log-probabilities (n, L + 1, vocabulary) of what comes next."""
    tokens = torch.tensor(sequences, dtype=torch.int64).view(len(sequences), -1)
    inputs = torch.cat([prefix.expand(len(tokens), -1, -1), model.embed(tokens)], dim=1)
    hidden, _ = model(inputs)
    return torch.log_softmax(model.logits(hidden[:, len(prefix) - 1 :]).double(), dim=-1)


def beam_search_by_full_passes(model, prefix, limit, beam, length_penalty=1.0, end=END):
    """As `decode` describes it, without stopping early: (tokens, finished, score) of all that is done, best first."""
    live, done = [((), 0.0)], []
    while live:
        log_probs = log_probs_by_full_pass(model, prefix, [tokens for tokens, _ in live])[:, -1].tolist()
        extended = [
            ((*tokens, token), score + row[token])
            for (tokens, score), row in zip(live, log_probs, strict=True)
            for token in range(len(row))
        ]
        extended.sort(key=lambda x: -x[1])
        kept, live = extended[: beam - len(done)], []
        for tokens, score in kept:
            if tokens[-1] == end:
                done.append((list(tokens[:-1]), True, score))
            elif len(tokens) == limit:
                done.append((list(tokens), False, score))
            else:
                live.append((tokens, score))
    return sorted(done, key=lambda x: -x[2] / (len(x[0]) + x[1]) ** length_penalty)


def all_by_enumeration(model, prefix, limit, length_penalty):
    """(tokens, finished, score) of every transcript that there is within the limit, best first."""
    others = [token for token in range(model.sizes.vocab_size) if token != END]
    done = []
    for length in range(limit + 1):
        sequences = list(itertools.product(others, repeat=length))
        log_probs = log_probs_by_full_pass(model, prefix, sequences)
        for sequence, rows in zip(sequences, log_probs, strict=True):
            score = sum(rows[i, token].item() for i, token in enumerate(sequence))
            if length < limit:
                done.append((list(sequence), True, score + rows[length, END].item()))
            else:
                done.append((list(sequence), False, score))
    return sorted(done, key=lambda x: -x[2] / (len(x[0]) + x[1]) ** length_penalty)


def plain(decoded):
    """A transcript and its alternatives in the form of the references."""
    return [(x.tokens, x.finished, pytest.approx(x.score, abs=2e-3)) for x in (decoded, *decoded.alternatives)]


@pytest.mark.parametrize(
    ("vocab_size", "n_embd", "head_size", "seed"),
    [(17, 64, 32, 1), (17, 64, 32, 2), (65, 128, 64, 0), (257, 128, 64, 1)],
    ids=["V17-C64-seed1", "V17-C64-seed2", "V65-C128", "V257-C128"],
)
def test_greedy_equals_full_passes_one_by_one(vocab_size, n_embd, head_size, seed):
    model = random_model(vocab_size, seed, n_embd, head_size)
    embeddings, lengths = batch(POSITIONS, n_embd)
    limits = [10 + 3 * i for i in range(len(POSITIONS))]
    results = decode(model, embeddings, lengths, max_new_tokens=limits)
    for prefix, length, limit, result in zip(embeddings, POSITIONS, limits, results, strict=True):
        assert plain(result) == beam_search_by_full_passes(model, prefix[:length], limit, beam=1)
        assert result.finished or len(result.tokens) == limit
    assert len({len(result.tokens) for result in results}) >= 6, "the case is void: too many end at the same time"


@pytest.mark.parametrize("beam", [1, 3], ids=["greedy", "beam3"])
@pytest.mark.parametrize("size", [1, 5, 24], ids=["B1", "B5", "B24"])
def test_a_batch_gives_what_one_by_one_gives(size, beam):
    model = random_model(17, 2)
    embeddings, lengths = batch(POSITIONS * 2)
    options = {"beam": beam, "n_best": beam}
    together = []
    for part, some in zip(embeddings.split(size), lengths.split(size), strict=True):
        # Each batch is as long as its longest utterance, as a caller would have it.
        together += decode(model, part[:, : some.max()], some, max_new_tokens=[50] * len(part), **options)
    for prefix, length, result in zip(embeddings, lengths, together, strict=True):
        (alone,) = decode(model, prefix[None, :length], length[None], max_new_tokens=[50], **options)
        assert plain(result) == [(x.tokens, x.finished, x.score) for x in (alone, *alone.alternatives)]
    assert len({len(result.tokens) for result in together}) >= 6
    assert {result.finished for result in together} == {True, False}


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [2, 5])
def test_beam_search_equals_full_passes(beam, length_penalty):
    model = random_model(17, 1)
    embeddings, lengths = batch((2, 81, 31, 5))
    for n_best in (1, beam):
        options = {"beam": beam, "n_best": n_best, "length_penalty": length_penalty}
        results = decode(model, embeddings, lengths, max_new_tokens=[25] * 4, **options)
        for prefix, length, result in zip(embeddings, lengths, results, strict=True):
            want = beam_search_by_full_passes(model, prefix[:length], 25, beam, length_penalty)
            assert plain(result) == want[:n_best]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_an_exhaustive_beam_finds_what_enumeration_finds(length_penalty):
    model = random_model(5, 3)
    embeddings, lengths = batch((2, 41, 11))
    limits = [4, 3, 4]
    for n_best in (1, 10, 341):  # 341 = 1 + 4 + 16 + 64 that end within 4 tokens, and 256 that don't
        options = {"beam": 341, "n_best": n_best, "length_penalty": length_penalty}
        results = decode(model, embeddings, lengths, max_new_tokens=limits, **options)
        for prefix, length, limit, result in zip(embeddings, lengths, limits, results, strict=True):
            want = all_by_enumeration(model, prefix[:length], limit, length_penalty)[:n_best]
            assert plain(result) == want
            assert len(want) == min(n_best, 341 if limit == 4 else 85)


def test_the_prefix_is_run_once_and_rows_leave_when_done():
    model = random_model(17, 2)
    embeddings, lengths = batch(POSITIONS)
    passes, heads = [], []
    hooks = [
        model.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape))),
        model.head.register_forward_pre_hook(lambda _, inputs: heads.append(tuple(inputs[0].shape))),
    ]
    results = decode(model, embeddings, lengths, max_new_tokens=[30] * len(POSITIONS))
    for hook in hooks:
        hook.remove()
    steps = [len(result.tokens) + result.finished for result in results]
    running = [sum(n > i for n in steps) for i in range(max(steps))]  # rows at each step, the prefix being the first
    assert running[0] > running[3] > running[10] > running[-1]
    assert passes == [tuple(embeddings.shape), *((rows, 1) for rows in running[1:])]
    assert heads == [(rows, 64) for rows in running], "logits at more positions than needed"


def test_beams_are_rows_of_one_batch_and_stop_when_decided():
    model = constant_model(t0=0.6, t7=0.3)
    embeddings, lengths = batch((4, 9))
    rows = []
    hook = model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    first, second = decode(model, embeddings, lengths, max_new_tokens=[100] * 2, beam=3, length_penalty=0)
    # Ended at once: 0.6. Of what goes on nothing can become more likely than 0.3.
    assert rows == [2]
    assert plain(first) == plain(second) == [([], True, pytest.approx(torch.tensor(0.6).log().item()))]
    rows.clear()
    decode(model, embeddings, lengths, max_new_tokens=[100] * 2, beam=3, n_best=2, length_penalty=0)
    hook.remove()
    assert rows == [2, 4], "one place of three is taken after the first step, the second best is found in the second"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_scores_are_summed_in_full(dtype):
    model = RWKV6(random_model(257, 0, 128, 64).sizes).to(dtype)
    model.load_state_dict(random_model(257, 0, 128, 64).state_dict())
    embeddings, lengths = batch((12,), 128)
    (result,) = decode(model, embeddings, lengths, max_new_tokens=[300], end=-1)
    assert len(result.tokens) == 300
    want = 0.0
    hidden, state = model(embeddings)
    for token in result.tokens:
        logits = model.logits(hidden[:, -1])
        assert logits.dtype == dtype
        want += torch.log_softmax(logits.double(), dim=-1)[0, token].item()
        hidden, state = model(torch.tensor([[token]]), state)
    assert result.score == pytest.approx(want, rel=1e-6)
    assert result.average_log_prob == pytest.approx(want / 300, rel=1e-6)


def test_average_counts_the_end_of_text():
    (result,) = decode(constant_model(t0=0.5), *batch((3,)), max_new_tokens=[9])
    assert (result.tokens, result.finished, result.n_scored) == ([], True, 1)
    assert result.average_log_prob == result.score == pytest.approx(-0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "surplus"),
    [
        pytest.param([7] * 48, 47, id="one-token"),
        pytest.param([1, 2, 3, *[7] * 48], 47, id="one-token-after-text"),
        pytest.param([7] * 47, 0, id="one-token-not-yet"),
        pytest.param([7] * 48 + [8], 0, id="one-token-and-over"),
        pytest.param([5, 6] * 24, 46, id="two-tokens"),
        pytest.param([6] + [5, 6] * 24, 46, id="two-tokens-off-phase"),
        pytest.param(list(range(5)) * 10, 43, id="five-tokens"),
        pytest.param(list(range(12)) * 4, 36, id="twelve-tokens"),
        pytest.param(list(range(13)) * 4, 39, id="thirteen-tokens"),
        pytest.param(list(range(13)) * 3 + list(range(12)), 0, id="thirteen-tokens-not-yet"),
        pytest.param(list(range(32)) * 4, 96, id="longest-period"),
        pytest.param(list(range(33)) * 9, 0, id="longer-than-the-longest"),
        pytest.param(([1] * 11 + [2]) * 4, 36, id="period-with-runs-in-it"),
        pytest.param(([1] * 11 + [2]) * 3 + [1] * 10 + [3, 2], 0, id="period-with-an-error"),
        pytest.param(list(b"no no no no no no no no"), 0, id="bytes-no-8-times"),
        pytest.param(list(b"one one one one one one one"), 0, id="bytes-one-7-times"),
        pytest.param(list(b"how do you do, how do you do, how do you do"), 0, id="bytes-sentence-3-times"),
        pytest.param([], 0, id="empty"),
    ],
)
def test_repeats(tokens, surplus):
    assert repeats(tokens) == surplus


@pytest.mark.parametrize("beam", [1, 2], ids=["greedy", "beam2"])
def test_a_run_away_is_reported_and_cut_only_with_the_guard(beam):
    model = constant_model(t7=0.9, t3=0.05)  # the end of text is a rare one of the rest
    prefixes = batch((6, 3))
    log_p = torch.tensor(0.9).log().item()
    free = decode(model, *prefixes, max_new_tokens=[200, 20], beam=beam)
    assert [(x.tokens, x.finished, x.loop) for x in free] == [([7] * 200, False, True), ([7] * 20, False, False)]
    assert free[0].score == pytest.approx(200 * log_p, abs=1e-4)
    steps = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    guarded = decode(model, *prefixes, max_new_tokens=[200, 20], beam=beam, loop_guard=True)
    hook.remove()
    assert (guarded[0].finished, guarded[0].loop) == (False, True)
    if beam == 1:
        assert (guarded[0].tokens, guarded[0].score) == ([7], pytest.approx(log_p, abs=1e-6))
        assert len(steps) == 48
    assert len(steps) < 120, "the guard spares most of the 200 steps"
    assert guarded[1] == free[1], "the other utterance of the batch goes on as before"


def test_a_loop_ranks_behind_what_does_not_loop():
    (result,) = decode(constant_model(t7=0.9, t0=0.05), *batch((6,)), max_new_tokens=[200], beam=2, n_best=2)
    (loop,) = result.alternatives
    assert (result.tokens, result.finished, result.loop) == ([], True, False)
    assert (loop.tokens, loop.finished, loop.loop) == ([7] * 200, False, True)
    assert loop.average_log_prob > result.average_log_prob


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": [5]}, "2 limits"),
        ({"max_new_tokens": [5, 0]}, "2 limits"),
        ({"beam": 0}, "n_best"),
        ({"beam": 2, "n_best": 3}, "n_best"),
        ({"length_penalty": -1.0}, "length_penalty"),
    ],
    ids=["too-few-limits", "limit-0", "beam-0", "more-n-best-than-beams", "negative-penalty"],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        decode(random_model(17, 1), *batch((2, 3)), **{"max_new_tokens": [5, 5], **options})


# --- from a state to a state -----------------------------------------------------------------------------------------


def prefilled(model, embeddings, lengths):
    """What the prompts leave: the last hidden vectors and the state."""
    with torch.inference_mode():
        hidden, state = model(embeddings, lengths=lengths)
        return last(hidden, lengths), state


def same_state(some, other):
    for x, y in zip(some.layers, other.layers, strict=True):
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beam", [1, 4], ids=["greedy", "beam4"])
def test_tokens_come_as_they_are_decided_and_make_the_answer(beam):
    model = random_model(17, 2)
    embeddings, lengths = batch(POSITIONS)
    limits, options = [40] * len(POSITIONS), DecodingOptions(beam=beam)
    results = decode(model, embeddings, lengths, max_new_tokens=limits, beam=beam)
    steps = generate(model, *prefilled(model, embeddings, lengths), max_new_tokens=limits, options=options)
    streamed, came = [[] for _ in POSITIONS], []

    def all_steps():
        ended = yield from steps
        assert ended == results

    for given in all_steps():
        came.append(len(given))
        for sample, token in given:
            streamed[sample].append(token)
    assert streamed == [result.tokens for result in results]
    if beam == 1:
        assert came[0] == sum(len(result.tokens) > 0 for result in results), "each step gives each sample's token"


@pytest.mark.parametrize("beam", [1, 3], ids=["greedy", "beam3"])
def test_the_final_state_is_that_after_prompt_and_answer(beam):
    """Against one pass over all of it; also where the limit cut the answer, before its last token was read."""
    model = random_model(17, 2)
    embeddings, lengths = batch(POSITIONS)
    results = decode(model, embeddings, lengths, max_new_tokens=[12] * len(POSITIONS), beam=beam, keep_state=True)
    assert {result.finished for result in results} == {True, False}
    for prefix, length, result in zip(embeddings, POSITIONS, results, strict=True):
        tokens = torch.tensor(result.tokens, dtype=torch.int64)
        _, state = model(torch.cat([prefix[None, :length], model.embed(tokens)[None]], dim=1))
        same_state(result.state, state)


def test_an_answer_goes_on_from_a_given_state():
    """Two prompts in a row, in one piece or with the state handed over."""
    model = random_model(17, 1)
    (whole, _), (length, _) = batch((60, 3))
    (first,) = decode(model, whole[None, :length], torch.tensor([length]), max_new_tokens=[9], keep_state=True)
    more = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(5))
    (second,) = decode(model, more, torch.tensor([7]), first.state, max_new_tokens=[20])
    tokens = model.embed(torch.tensor([first.tokens], dtype=torch.int64))
    joined = torch.cat([whole[None, :length], tokens, more], dim=1)
    (together,) = decode(model, joined, torch.tensor([joined.shape[1]]), max_new_tokens=[20])
    assert plain(second) == plain(together)
    assert len(second.tokens) > 2, "the case is void"


def test_a_loop_that_is_cut_has_the_state_of_all_that_was_generated():
    model = constant_model(t7=0.9, t3=0.05)
    embeddings, lengths = batch((6,))
    (result,) = decode(model, embeddings, lengths, max_new_tokens=[200], loop_guard=True, keep_state=True)
    assert result.tokens == [7]
    _, state = model(torch.cat([embeddings, model.embed(torch.tensor([[7] * 48]))], dim=1))
    same_state(result.state, state)


# --- sampling --------------------------------------------------------------------------------------------------------


def drawn(model, count, **how):
    """First tokens of many samples, None for the end of text."""
    embeddings, lengths = batch((3,) * count)
    results = decode(model, embeddings, lengths, max_new_tokens=[1] * count, **how)
    return [result.tokens[0] if result.tokens else None for result in results]


def test_samples_follow_the_distribution():
    """Chi-squared over 4,000 draws against probabilities known by construction: 0.5, 0.3, 0.1, and 14 of 1/140."""
    model = constant_model(t0=0.5, t7=0.3, t3=0.1)
    tokens = drawn(model, 4000, temperature=1.0)
    expected = {None: 0.5, 7: 0.3, 3: 0.1} | {i: 0.1 / 14 for i in range(17) if i not in (0, 3, 7)}
    chi = sum((tokens.count(token) - 4000 * p) ** 2 / (4000 * p) for token, p in expected.items())
    assert chi < 39.25, "the 99.9 % quantile for 16 degrees of freedom"


def test_temperature_sharpens_and_top_p_leaves_out():
    model = constant_model(t0=0.5, t7=0.3, t3=0.1)
    cold = drawn(model, 1000, temperature=0.25)
    # p^4 / sum: 0.0625, 0.0081, 0.0001 -> 0.884, 0.115, 0.0014
    assert cold.count(None) / 1000 == pytest.approx(0.884, abs=0.03)
    assert set(drawn(model, 300, temperature=1.0, top_p=0.5)) == {None}
    kept = drawn(model, 1000, temperature=1.0, top_p=0.75)
    assert set(kept) == {None, 7}, "0.5 and 0.3 reach 0.75 together"
    assert kept.count(None) / 1000 == pytest.approx(0.5 / 0.8, abs=0.05)


def test_samples_depend_on_seed_and_name_not_on_the_batch():
    model = random_model(17, 1)
    embeddings, lengths = batch((9,) * 6)
    names = [f"u{i}" for i in range(6)]
    how = {"temperature": 1.0, "max_new_tokens": [20] * 6}
    together = decode(model, embeddings, lengths, names=names, **how)
    for i, name in enumerate(names):
        (alone,) = decode(model, embeddings[i : i + 1], lengths[:1], names=[name], **how | {"max_new_tokens": [20]})
        assert alone.tokens == together[i].tokens
    assert decode(model, embeddings, lengths, names=names, **how) == together
    other = decode(model, embeddings, lengths, names=names, sampling_seed=1, **how)
    assert sum(a.tokens != b.tokens for a, b in zip(other, together, strict=True)) >= 5
    assert together[0].score == pytest.approx(
        sum(log_probs_of(model, embeddings[0, :9], together[0].tokens, together[0].finished)), abs=1e-3
    ), "the score is the model's own, whatever the temperature"


def log_probs_of(model, prefix, tokens, finished):
    (rows,) = log_probs_by_full_pass(model, prefix, [tokens])
    targets = [*tokens, END] if finished else tokens
    return [rows[i, token].item() for i, token in enumerate(targets)]


# --- a set of answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 3], ids=["one-pass", "split"])
def test_answers_are_scored_as_full_passes_score_them(monkeypatch, rows):
    monkeypatch.setattr(rwkv_speech.decoding, "SCORED_ROWS", rows)
    model = random_model(17, 2)
    embeddings, lengths = batch((2, 57, 16))
    answers = [[3], [], [5, 6, 7], [1, 2], [5, 6]]
    scores = score_answers(model, *prefilled(model, embeddings, lengths), answers)
    assert scores.shape == (3, 5)
    for prefix, length, row in zip(embeddings, lengths.tolist(), scores.tolist(), strict=True):
        for answer, score in zip(answers, row, strict=True):
            assert score == pytest.approx(sum(log_probs_of(model, prefix[:length], answer, True)), abs=1e-3)


def test_answers_are_chosen_by_their_average_per_token():
    model = random_model(17, 2)
    embeddings, lengths = batch((2, 57, 16))
    answers = [[3], [5, 6, 7, 8, 9, 10], [1, 2], [4]]
    results = choose(model, *prefilled(model, embeddings, lengths), answers)
    by_sum = set()
    for prefix, length, result in zip(embeddings, lengths.tolist(), results, strict=True):
        sums = [sum(log_probs_of(model, prefix[:length], answer, True)) for answer in answers]
        averages = [total / (len(answer) + 1) for total, answer in zip(sums, answers, strict=True)]
        ranked = sorted(range(4), key=lambda i: -averages[i])
        found = [result, *result.alternatives]
        assert [x.tokens for x in found] == [answers[i] for i in ranked]
        assert [x.average_log_prob for x in found] == pytest.approx([averages[i] for i in ranked], abs=1e-4)
        weights = [math.exp(averages[i] * math.sqrt((2 + 7 + 3 + 2) / 4)) for i in ranked]
        assert [x.probability for x in found] == pytest.approx([w / sum(weights) for w in weights], abs=1e-4)
        by_sum.add(max(range(4), key=sums.__getitem__) == ranked[0])
    assert False in by_sum, "the case is void: sums would choose the same"


def test_probabilities_of_all_answers_sum_to_one():
    """All answers of at most 2 tokens over a vocabulary of 5, and what has begun with 3."""
    model = random_model(5, 3)
    embeddings, lengths = batch((11,))
    short = [list(x) for n in range(3) for x in itertools.product(range(1, 5), repeat=n)]
    hidden, state = prefilled(model, embeddings, lengths)
    ended = score_answers(model, hidden, state, short).exp().sum().item()
    begun = sum(math.exp(x) for answer in short if len(answer) == 2
                for x in [sum(log_probs_of(model, embeddings[0], answer, False))])  # fmt: skip
    still_open = begun - sum(math.exp(x) for x in score_answers(model, hidden, state, short)[0, -16:].tolist())
    assert ended + still_open == pytest.approx(1, abs=1e-4)


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_output_that_is_not_finite_is_an_error(monkeypatch):
    model = random_model(17, 1)
    embeddings, lengths = batch((4, 9))
    embeddings[1] *= math.nan
    hidden, state = prefilled(model, embeddings, lengths)
    for how in ({}, {"beam": 2}, {"temperature": 1.0}):
        with pytest.raises(UserError, match="not finite"):
            decode(model, embeddings, lengths, max_new_tokens=[5, 5], **how)
    with pytest.raises(UserError, match="not finite"):
        score_answers(model, hidden, state, [[1], [2]])


def test_a_score_of_minus_infinity_is_an_error_too(monkeypatch):
    """As of logits that left the range of fp16: the best token has a number, the alternatives have none."""
    model = constant_model(t7=0.9)
    embeddings, lengths = batch((4,))
    plain, all_but_7 = model.logits, torch.arange(model.sizes.vocab_size) != 7
    monkeypatch.setattr(model, "logits", lambda hidden: plain(hidden).masked_fill(all_but_7, -math.inf))
    (best,) = decode(model, embeddings, lengths, max_new_tokens=[3])
    assert best.tokens == [7, 7, 7]
    with pytest.raises(UserError, match="output is not finite"):
        decode(model, embeddings, lengths, max_new_tokens=[3], beam=2)

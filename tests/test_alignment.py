"""The CTC loss against frozen embeddings: torch's over the whole vocabulary, paths counted by hand, and training."""

import csv
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rwkv_speech import alignment
from rwkv_speech.alignment import BLANK, SCALE, alignment_loss_sum, fits
from rwkv_speech.data.sample import one_round
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.errors import UserError
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.options import TrainingOptions
from tests.tiny import do, last, missions

VOCABULARY, WIDTH = 40, 12
LENGTHS = torch.tensor([9, 5, 7])
TOKENS = [torch.tensor(t) for t in ([7, 7, 30], [2, 39], [5, 6, 7, 5])]


def cosine_log_probs(heard, embeddings):
    cosines = F.cosine_similarity(heard[..., None, :], embeddings, dim=-1)
    return (SCALE * cosines).log_softmax(-1)


@pytest.fixture
def heard():
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def embeddings():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rows", [4, 256], ids=["in-pieces", "at-once"])
def test_it_is_ctc_over_the_whole_vocabulary(heard, embeddings, rows, monkeypatch):
    monkeypatch.setattr(alignment, "ROWS", rows)
    ours, theirs = heard.clone().requires_grad_(), heard.double().requires_grad_()
    loss = alignment_loss_sum(ours, LENGTHS, TOKENS, embeddings)
    log_probs = cosine_log_probs(theirs, embeddings.double()).transpose(0, 1)
    counts = torch.tensor([len(t) for t in TOKENS])
    expected = F.ctc_loss(log_probs, torch.cat(TOKENS), LENGTHS, counts, blank=BLANK, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert not ours.grad[1, 5:].any()


def test_it_is_the_sum_over_all_paths(embeddings):
    heard = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(3))
    said = [7, 9]
    log_probs = cosine_log_probs(heard.double(), embeddings.double())[0]
    chance = 0.0
    for path in itertools.product([BLANK, *said], repeat=4):
        merged = [token for token, _ in itertools.groupby(path) if token != BLANK]
        if merged == said:
            chance += log_probs[range(4), path].sum().exp()
    loss = alignment_loss_sum(heard, torch.tensor([4]), [torch.tensor(said)], embeddings)
    torch.testing.assert_close(loss.double(), -chance.log(), rtol=1e-5, atol=0)


def test_lengths_of_vectors_do_not_matter(heard, embeddings):
    loss = alignment_loss_sum(heard, LENGTHS, TOKENS, embeddings)
    scaled = alignment_loss_sum(3 * heard, LENGTHS, TOKENS, embeddings * torch.rand(VOCABULARY, 1).add(0.5))
    torch.testing.assert_close(scaled, loss)


def test_a_transcript_too_long_for_its_audio_counts_for_nothing(heard, embeddings):
    heard.requires_grad_()
    without = alignment_loss_sum(heard[:2], LENGTHS[:2], TOKENS[:2], embeddings)
    loss = alignment_loss_sum(heard, LENGTHS, [*TOKENS[:2], torch.arange(8) + 3], embeddings)
    torch.testing.assert_close(loss, without)
    loss.backward()
    assert heard.grad.isfinite().all()
    assert not heard.grad[2].any()


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [([7, 7, 30], 4), ([7, 7, 7], 5), ([2, 39], 2), ([5, 6, 5], 3), ([5, 6, 6, 5, 5], 7), ([], 0)],
    ids=str,
)
def test_equal_neighbours_need_a_blank_between_them(tokens, positions):
    assert fits(torch.tensor(tokens, dtype=torch.int64), positions)
    assert not fits(torch.tensor(tokens, dtype=torch.int64), positions - 1)
    if tokens:  # as torch has it, an alignment that there is none of has an infinite loss
        for n, finite in ((positions, True), (positions - 1, False)):
            log_probs = torch.zeros(n, 1, VOCABULARY).log_softmax(-1)
            loss = F.ctc_loss(log_probs, torch.tensor([tokens]), [n], [len(tokens)], blank=BLANK, reduction="sum")
            assert loss.isfinite() == finite


def test_an_embedding_of_zeros_is_at_right_angles_to_all(heard, embeddings):
    embeddings[[3, 39]] = 0  # one that no transcript holds, and one that the second does
    heard.requires_grad_()
    loss = alignment_loss_sum(heard, LENGTHS, TOKENS, embeddings)
    log_probs = cosine_log_probs(heard.double(), embeddings.double()).transpose(0, 1)
    counts = torch.tensor([len(t) for t in TOKENS])
    expected = F.ctc_loss(log_probs, torch.cat(TOKENS), LENGTHS, counts, blank=BLANK, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, heard)[0].isfinite().all()


def rows(project):
    """What was measured at each step, as numbers."""
    with (project / "metrics.csv").open() as file:
        found = [
            {name: value for name, value in row.items() if value and name != "run"} for row in csv.DictReader(file)
        ]
    return [{name: float(value) for name, value in row.items()} for row in found]


def test_transcripts_that_do_not_fit_are_counted_and_left_out(world, tmp_path, caplog):
    """Beside as many that do, they change neither the loss that is reported nor what is learnt from it."""
    long = "abcdefghij" * 4
    short = [{"audio": str(path), "text": "ab", "id": path.stem} for path, _ in world.utterances[:4]]
    lines = {"half": [*short, *(line | {"text": long, "id": f"long{i}"} for i, line in enumerate(short))]}
    lines |= {"short": short, "long": lines["half"][4:]}
    flags = ["--epoch_count=1", "--ctc_align=0.5", "--ctc_align_steps=1", "--adam_eps=1", "--grad_clip=0"]
    flags += ["--micro_bsz=2", "--lr_init=1", "--lr_final=1", "--average=9"]
    for name, content in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    do("train", world, tmp_path / "short", *flags, f"--data={tmp_path}/short.jsonl", "--accumulate_grad_batches=2")
    assert "fit into their positions" not in caplog.text
    do("train", world, tmp_path / "half", *flags, f"--data={tmp_path}/half.jsonl", "--accumulate_grad_batches=4")
    assert "4 of 8 transcripts fit into their positions" in caplog.text
    (short_row,), (half_row,) = rows(tmp_path / "short"), rows(tmp_path / "half")
    assert half_row["ctc_loss"] == pytest.approx(short_row["ctc_loss"], rel=1e-5)
    assert short_row["ctc_loss"] > 1
    for name, x in last(tmp_path / "short").items():
        torch.testing.assert_close(last(tmp_path / "half")[name], x, rtol=1e-4, atol=1e-6)
    assert missions(tmp_path / "half")["rwkv-adapter-1.pth"][1]["train_loss"] is None, "no step computed it"

    with pytest.raises(UserError, match=r"^0 of 4 transcripts fit into their positions: lower --downsample_k, 5 here$"):
        do("train", world, tmp_path / "long", *flags, f"--data={tmp_path}/long.jsonl")


def test_steps_alone_leave_the_language_model_out(world, tmp_path, monkeypatch, caplog):
    calls = []
    forward = RWKV6.forward
    monkeypatch.setattr(RWKV6, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    flags = ["--epoch_count=1", "--epoch_steps=6", "--ctc_align=0.5", "--downsample_k=2"]
    do("train", world, tmp_path / "alone", *flags, "--ctc_align_steps=6")
    assert not calls
    assert "--ctc_align_steps 6 is all of the run's 6 steps" in caplog.text
    caplog.clear()
    found = rows(tmp_path / "alone")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert all("loss" not in row for row in found)
    assert found[-1]["ctc_loss"] < found[0]["ctc_loss"]
    assert not any(x.any() for name, x in last(tmp_path / "alone").items() if "time_state" in name)

    do("train", world, tmp_path / "both", *flags, "--ctc_align_steps=4")
    assert len(calls) == 2
    assert "--ctc_align_steps" not in caplog.text
    found = rows(tmp_path / "both")
    assert ["loss" in row for row in found] == [False] * 4 + [True] * 2
    assert all("ctc_loss" in row for row in found)
    assert all(x.any() for name, x in last(tmp_path / "both").items() if "time_state" in name)


def test_its_weight_is_that_of_its_gradient(world):
    model = world.speech_rwkv(downsample_k=2, adapter_hidden=8)
    waveforms = torch.randn(2, 16000, generator=torch.Generator().manual_seed(4))
    batch = model.prepare([one_round(text, [x], text) for x, text in zip(waveforms, ["ab", "cde"], strict=True)])
    batch.step_tokens, batch.step_aligned = batch.tokens, batch.aligned
    assert batch.tokens == 7
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda x, reduce_op: x),
        world_size=1,
        accumulate_grad_batches=1,
        global_step=0,
    )

    def gradient(weight, steps=0):
        module = TrainingModule(model, TrainingOptions(ctc_align=weight, ctc_align_steps=steps))
        module.trainer = trainer
        loss = module.training_step(batch, 0)["loss"]
        (gradient,) = torch.autograd.grad(loss, model.adapter.layers[0].weight)
        return gradient

    text, ctc = gradient(0.0), gradient(1.0, steps=1)
    assert text.any()
    assert ctc.any()
    torch.testing.assert_close(gradient(0.5), text + 0.5 * ctc)

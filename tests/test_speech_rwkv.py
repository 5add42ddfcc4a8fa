"""SpeechRWKV against its parts put together by hand: the sequence, the loss, what learns, what is transcribed."""

import hashlib

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch
from torch.utils.data import DataLoader

from rwkv_speech.data.sample import one_round
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.errors import UserError
from rwkv_speech.options import TrainingOptions
from rwkv_speech.speech.audio import AudioError

pytestmark = pytest.mark.usefixtures("voiced")

HASH = 36  # the token of "#"
TEXTS = ["abcab", "j", "feed a cab", "de"]


@pytest.fixture
def model(world):
    """Of a small adapter, and with initial states that aren't zero."""
    torch.manual_seed(3)
    model = world.speech_rwkv(adapter_hidden=24)
    with torch.no_grad():
        for block in model.language_model.blocks:
            block.att.time_state.normal_()
    return model


@pytest.fixture(scope="module")
def waveforms(world):
    """1.2, 0.3 and 0.75 s, and less than one frame."""
    audio = torch.cat([torch.from_numpy(soundfile.read(p, dtype="float32")[0]) for p, _ in world.utterances[:8]])
    return [audio[:19200], audio[20000:24800], audio[26000:38000], audio[40000:40090]]


def frames_by_hand(model, waveform):
    """One waveform through the encoder, stacked K = 5 channel-major, through the adapter in fp64: a list of (C,)."""
    (frames,), (length,) = model.speech_encoder([waveform])
    frames = frames[:length].double()  # (F, 32)
    while len(frames) < 5:
        frames = torch.cat([frames, torch.zeros(1, 32, dtype=torch.float64)])
    first, _, second = model.adapter.layers
    embedded = []
    for start in range(0, len(frames) - 4, 5):
        stacked = torch.zeros(160, dtype=torch.float64)
        for channel in range(32):
            for offset in range(5):
                stacked[channel * 5 + offset] = frames[start + offset, channel]
        hidden = (first.weight.double() @ stacked + first.bias.double()).clamp(min=0)
        embedded.append((second.weight.double() @ hidden + second.bias.double()).float())
    return embedded


@torch.no_grad()
def log_probs_by_hand(model, waveform, text):
    """Of each transcript token and the end of text, position by position with the state carried along, in fp64."""
    emb = model.language_model.emb.weight
    tokens = [byte + 1 for byte in text.encode()]  # in a vocabulary of 257
    positions = [*frames_by_hand(model, waveform), emb[HASH], *(emb[token] for token in tokens)]
    state, logits = None, []
    for x in positions:
        hidden, state = model.language_model(x[None, None], state)
        logits.append(model.language_model.logits(hidden)[0, 0].double())
    told = logits[len(positions) - len(tokens) - 1 :]  # from "#" on
    return [
        (x - x.exp().sum().log())[target].item()  # logits are small enough for that
        for x, target in zip(told, [*tokens, 0], strict=True)
    ]


def batch(model, waveforms, texts):
    """One optimiser step, in one micro-batch."""
    samples = [one_round(str(i), [x], text) for i, (x, text) in enumerate(zip(waveforms, texts, strict=True))]
    made = model.prepare(samples)
    made.step_tokens = made.tokens
    return made


def fit(model, options, batches, *callbacks):
    """Trains on these batches, once, by a plain Trainer."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TrainingModule(model, options), DataLoader(batches, batch_size=None))
    return trainer


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(4), ids=["1.2s", "0.3s", "0.75s", "90-samples"])
def test_loss_is_that_of_the_sequence_by_hand(model, waveforms, i):
    by_hand = log_probs_by_hand(model, waveforms[i], TEXTS[i])
    assert len(by_hand) == len(TEXTS[i]) + 1
    expected = -sum(by_hand) / len(by_hand)
    assert model.loss([waveforms[i]], [TEXTS[i]]).item() == pytest.approx(expected, rel=1e-5)


def test_the_end_is_learned_at_the_last_token(model, waveforms):
    """An empty transcript has one target, id 0 at "#"; a longer text adds its tokens and moves it."""
    (end,) = log_probs_by_hand(model, waveforms[0], "")
    assert model.loss([waveforms[0]], [""]).item() == pytest.approx(-end, rel=1e-5)
    made = batch(model, waveforms[:1], ["ab"])
    total = model.loss_sum(made)
    assert made.tokens == 3
    assert total.item() == pytest.approx(-sum(log_probs_by_hand(model, waveforms[0], "ab")), rel=1e-5)


def test_loss_of_a_batch_is_the_mean_over_its_tokens(model, waveforms):
    alone = [model.loss([w], [t]).item() for w, t in zip(waveforms, TEXTS, strict=True)]
    counts = [len(text) + 1 for text in TEXTS]
    expected = np.average(alone, weights=counts)
    assert abs(expected - np.mean(alone)) > 1e-3, "the case is void: the mean over samples is the same"
    together = model.loss(waveforms, TEXTS)
    assert together.shape == ()
    assert together.dtype == torch.float32
    assert together.item() == pytest.approx(expected, rel=1e-5)
    assert model.loss([w.numpy() for w in waveforms], TEXTS).item() == together.item()


def test_loss_of_unequal_lists_or_other_arrays_is_an_error(model, waveforms):
    with pytest.raises(ValueError, match="argument"):
        model.loss(waveforms, TEXTS[:3])
    with pytest.raises(AudioError, match=r"waveform 1.*int16"):
        model.loss([waveforms[0], (waveforms[1] * 32768).to(torch.int16)], TEXTS[:2])


def test_positions_are_those_that_the_sequence_has(model, waveforms):
    made = batch(model, waveforms, TEXTS)
    for waveform, text, length in zip(waveforms, TEXTS, made.lengths.tolist(), strict=True):
        assert length == len(frames_by_hand(model, waveform)) + 1 + len(text)
    assert batch(model, [torch.randn(16000)], ["abc"]).lengths.tolist() == [49 // 5 + 1 + 3]


def test_the_embedded_sequence_is_audio_then_separator_then_text(model, waveforms):
    made = batch(model, waveforms, TEXTS)
    embedded = model.embed(made, model.embed_audio(made)[0])
    emb = model.language_model.emb.weight
    for row, waveform, text in zip(embedded, waveforms, TEXTS, strict=True):
        expected = [*frames_by_hand(model, waveform), emb[HASH], *(emb[byte + 1] for byte in text.encode())]
        torch.testing.assert_close(row[: len(expected)], torch.stack(expected), rtol=1e-4, atol=1e-5)


# --- what learns -----------------------------------------------------------------------------------------------------


def test_gradients_reach_every_state_and_the_adapter_and_nothing_else(model, waveforms):
    model.loss(waveforms, TEXTS).backward()
    trained = model.trainable_state_dict()
    assert len(trained) == 2 + 4
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    for head in (0, 1):
        assert all(block.att.time_state.grad[head].abs().max() > 0 for block in model.language_model.blocks)
    inside = {id(parameter) for parameter in trained.values()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in inside) == parameter.requires_grad, name
        assert parameter.requires_grad or parameter.grad is None, name


def test_gradients_are_the_slopes_of_the_loss(model, waveforms):
    """Along a random direction in each trained tensor, by central differences."""
    model.loss(waveforms, TEXTS).backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.trainable_state_dict().items():
        direction = torch.randn(parameter.shape, generator=generator)
        direction += 3 * parameter.grad / parameter.grad.norm() * parameter.numel() ** 0.5
        direction *= 1e-3 / direction.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * direction
                losses.append(model.loss(waveforms, TEXTS).double().item())
                parameter -= sign * direction
        slope = (parameter.grad.double() * direction.double()).sum().item()
        assert (losses[0] - losses[1]) / 2 == pytest.approx(slope, rel=2e-2), name


def test_recomputing_layers_changes_no_gradient(model, waveforms):
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.language_model.checkpointing = recompute
        model.loss(waveforms, TEXTS).backward()
        gradients.append([p.grad.clone() for p in model.trainable_state_dict().values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_changes_what_is_trained_and_nothing_else_to_the_last_bit(world, waveforms, dtype):
    model = world.speech_rwkv(dtype=dtype, adapter_hidden=24)
    options = TrainingOptions(lr_init=1e-5, warmup_steps=0)  # far below half a step of bf16
    file = hashlib.sha256(world.model.read_bytes()).hexdigest()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fit(model, options, [batch(model, waveforms, TEXTS)] * 3)
    trained = {id(x) for x in model.trainable_state_dict().values()}
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(before) <= set(after)
    for name, x in before.items():
        assert torch.equal(after[name], x) != (id(after[name]) in trained), name
    assert hashlib.sha256(world.model.read_bytes()).hexdigest() == file


def test_masters_are_fp32_under_bf16(world, waveforms):
    model = world.speech_rwkv(dtype=torch.bfloat16, adapter_hidden=24)
    assert model.language_model.dtype == model.speech_encoder.model.dtype == torch.bfloat16
    frames, _ = model.embed_audio(batch(model, waveforms[:1], TEXTS[:1]))
    assert frames.dtype == torch.bfloat16
    loss = model.loss(waveforms, TEXTS)
    loss.backward()
    assert loss.dtype == torch.float32
    for name, x in model.trainable_state_dict().items():
        assert (x.dtype, x.grad.dtype) == (torch.float32, torch.float32), name
    full = world.speech_rwkv(adapter_hidden=24)
    full.load_trained(model.trainable_state_dict())
    assert loss.item() == pytest.approx(full.loss(waveforms, TEXTS).item(), rel=2e-2)


def test_trainable_state_dict_holds_the_parameters_themselves(model):
    trained = model.trainable_state_dict()
    assert list(trained) == [
        "language_model.blocks.0.att.time_state",
        "language_model.blocks.1.att.time_state",
        "speech_encoder.adapter.0.weight",
        "speech_encoder.adapter.0.bias",
        "speech_encoder.adapter.2.weight",
        "speech_encoder.adapter.2.bias",
    ]
    assert trained["language_model.blocks.1.att.time_state"] is model.language_model.blocks[1].att.time_state
    assert trained["speech_encoder.adapter.2.weight"] is model.adapter.layers[2].weight


def test_without_a_mission_file_states_are_zero_and_the_adapter_is_torchs(world):
    torch.manual_seed(5)
    model = world.speech_rwkv()
    torch.manual_seed(5)
    first, second = torch.nn.Linear(5 * 32, 2048), torch.nn.Linear(2048, 64)
    # The encoder may draw from the generator before; so not the numbers but their range: 1 / sqrt(inputs).
    for layer, plain in ((model.adapter.layers[0], first), (model.adapter.layers[2], second)):
        assert layer.weight.shape == plain.weight.shape
        assert layer.weight.abs().max().item() == pytest.approx(plain.weight.abs().max().item(), rel=1e-2)
        assert layer.bias.abs().max() <= plain.in_features**-0.5
    assert all((block.att.time_state == 0).all() for block in model.language_model.blocks)


# --- the optimiser's plan --------------------------------------------------------------------------------------------


def test_learning_rate_at_points_worked_by_hand():
    constant = TrainingOptions(warmup_steps=100)
    assert constant.lr_factor(0, 1000) == pytest.approx(0.2)
    assert constant.lr_factor(50, 1000) == pytest.approx(0.6)
    assert [constant.lr_factor(step, 1000) for step in (100, 500, 1000)] == [1, 1, 1]
    low = TrainingOptions(lr_init=1e-5, warmup_steps=0)
    assert low.lr_factor(1000, 1000) == 1, "without lr_final the rate stays"
    falling = TrainingOptions(lr_init=1e-3, lr_final=1e-5, warmup_steps=100)
    assert falling.lr_factor(0, 1101) == pytest.approx(0.2)
    assert falling.lr_factor(100, 1101) == pytest.approx(1)
    assert falling.lr_factor(600, 1101) == pytest.approx(0.1), "halfway it is the geometric mean"
    assert falling.lr_factor(1100, 1101) == pytest.approx(0.01), "the last of 1101 steps"
    rising = TrainingOptions(lr_init=1e-4, lr_final=4e-4, warmup_steps=0)
    assert [rising.lr_factor(step, 101) for step in (0, 50, 100)] == pytest.approx([1, 2, 4])


def test_the_state_has_its_own_learning_rate_and_only_matrices_decay(model, waveforms):
    options = TrainingOptions(
        **{"lr_init": 1e-3, "warmup_steps": 4, "state_lr_scale": 5.0, "weight_decay": 0.1},
        **{"beta1": 0.8, "beta2": 0.95, "adam_eps": 1e-6},
    )
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer = fit(model, options, [batch(model, waveforms[1:2], ["a"])] * 6, Watch())
    factors = [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert rates == [pytest.approx([1e-3 * f, 1e-3 * f, 5e-3 * f]) for f in factors]
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    matrices = {id(layer.weight) for layer in (model.adapter.layers[0], model.adapter.layers[2])}
    trained = {id(x) for x in model.trainable_state_dict().values()}
    assert decay == {x: 0.1 if x in matrices else 0.0 for x in trained}


# --- transcribing ----------------------------------------------------------------------------------------------------


def test_transcripts_keep_their_order_whatever_the_batch(world, model, waveforms):
    paths = [path for path, _ in world.utterances[:5]]
    arrays = [soundfile.read(path, dtype="float32")[0] for path in paths]
    mixed = [str(paths[0]), arrays[1], torch.from_numpy(arrays[2]), paths[3], arrays[4], *waveforms]
    alone = [model.transcribe([audio], max_new_tokens=12)[0] for audio in mixed]
    assert len(set(alone)) >= 5, "the case is void: too many transcripts are the same"
    for batch_size in (1, 2, 4, 100):
        assert model.transcribe(mixed, batch_size=batch_size, max_new_tokens=12) == alone
    assert model.transcribe(paths, max_new_tokens=12) == [
        model.transcribe([array], max_new_tokens=12)[0] for array in arrays
    ]
    assert model.transcribe([]) == []


def test_a_transcript_is_the_most_likely_token_each_time(model, waveforms):
    """Greedy decoding by hand, through the loss of one more token at a time."""
    emb = model.language_model.emb.weight
    tokens = []
    with torch.no_grad():
        state = None
        for x in [*frames_by_hand(model, waveforms[0]), emb[HASH]]:
            hidden, state = model.language_model(x[None, None], state)
        while len(tokens) < 12:
            tokens.append(model.language_model.logits(hidden)[0, 0].argmax().item())
            if tokens[-1] == 0:
                break
            hidden, state = model.language_model(emb[tokens[-1]][None, None], state)
    expected = bytes(token - 1 for token in tokens if token).decode(errors="replace").strip()
    assert model.transcribe([waveforms[0]], max_new_tokens=12) == [expected]


def test_a_transcript_is_as_long_as_its_audio_allows(model, waveforms):
    model.language_model.head.weight[0] = -50  # never the end
    model.language_model.ln_out.bias.fill_(1)
    long = torch.cat([waveforms[0]] * 3)  # 3.6 s
    for audio, limit in ((waveforms[1], 100), (long, 180)):
        (decoded,) = model.decode(batch(model, [audio], [""]))
        assert (len(decoded.tokens), decoded.finished) == (limit, False)


def test_a_file_that_is_none_is_named(model, tmp_path):
    path = tmp_path / "noise.wav"
    path.write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"noise\.wav"):
        model.transcribe([path])

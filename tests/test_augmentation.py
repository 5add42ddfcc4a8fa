"""Speed, noise and masks: as much as was asked for, and the same for one seed, epoch and utterance wherever drawn."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.data.batches import SpeechDataset
from rwkv_speech.data.buckets import bucketed_loader
from rwkv_speech.data.loading import AccumulationLoader, loader
from rwkv_speech.data.rendering import Renderer
from rwkv_speech.data.sample import Row
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.errors import UserError
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.missions import get_mission
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops import OPS
from rwkv_speech.options import Options
from rwkv_speech.speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.speech.augmentation import SPEEDS, Masks, SpecAugment, WaveformAugmentation, apply_masks
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.recording import Recording
from tests.tiny import last, write_world


def sine(frequency: float, samples: int = SAMPLE_RATE) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(samples) / SAMPLE_RATE)


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> list[Path]:
    """Noise of 0.1, 0.5 and 3 s, of different levels."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for level, seconds in ((0.01, 0.1), (0.1, 0.5), (0.3, 3.0)):
        samples = level * rng.standard_normal(int(seconds * SAMPLE_RATE))
        soundfile.write(folder / f"{seconds}.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    return sorted(folder.iterdir())


def heard(rows: list[Row], transform: WaveformAugmentation) -> SpeechDataset:
    """A dataset whose items hold the augmented waveforms as they are, each a single frame."""
    renderer = Renderer(Tokenizer(257), frame_count=lambda samples: 1, group_count=lambda frames: 1)
    return SpeechDataset(
        rows,
        sample_of=get_mission("transcribe").sample,
        renderer=renderer,
        extract=lambda waveform: waveform,
        transform=transform,
    )


def power(waveform: torch.Tensor) -> float:
    return float(waveform.double().square().mean())


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", SPEEDS)
def test_speed_changes_length_and_pitch_by_its_factor(speed):
    change = WaveformAugmentation(0, speeds=(speed,))
    changed = change("a", sine(440), 0)
    assert len(changed) == pytest.approx(SAMPLE_RATE / speed, abs=2)
    spectrum = np.abs(np.fft.rfft(changed.numpy() * np.hanning(len(changed))))
    assert spectrum.argmax() * SAMPLE_RATE / len(changed) == pytest.approx(440 * speed, abs=1)
    assert power(changed) == pytest.approx(0.5, rel=0.01)


def test_speeds_are_drawn_anew_and_alike_often():
    change = WaveformAugmentation(3, speeds=SPEEDS)
    drawn = {(id, epoch): change.speed(f"1-2-{id:04}", epoch) for id in range(500) for epoch in range(6)}
    assert {speed: pytest.approx(1000, abs=120) for speed in SPEEDS} == Counter(drawn.values())
    both = Counter((drawn[id, 0], drawn[id, 1]) for id in range(500))  # nor does one epoch foretell the next
    assert len(both) == 9
    assert max(both.values()) < 90
    assert all(len(change("1-2-0007", sine(99, 900), epoch)) == pytest.approx(900 / drawn[7, epoch], abs=2)
               for epoch in range(6))  # fmt: skip


def test_lengths_foretell_what_an_epoch_makes():
    change = WaveformAugmentation(3, speeds=SPEEDS)
    ids, seconds = [f"u{n}" for n in range(30)], np.linspace(0.1, 0.2, 30)
    for epoch in range(3):
        made = [len(change(id, sine(50, round(s * 16000)), epoch)) / 16000 for id, s in zip(ids, seconds, strict=True)]
        np.testing.assert_allclose(change.lengths(ids, seconds, epoch), made, atol=2e-4)


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [-5.0, 0.0, 12.5])
def test_noise_is_as_loud_as_asked(noises, asked):
    speech = 0.3 * sine(440, 2 * SAMPLE_RATE)
    change = WaveformAugmentation(0, noise=noises, snr_db=(asked, asked))
    for epoch in range(6):  # each of the noises, some shorter than the speech and some longer
        noise = change("a", speech, epoch) - speech
        assert 10 * np.log10(power(speech) / power(noise)) == pytest.approx(asked, abs=0.01)


def test_snr_and_noise_are_drawn(noises):
    speech = 0.3 * sine(440, 800)
    change = WaveformAugmentation(0, noise=noises, snr_db=(5.0, 20.0))
    drawn = [10 * np.log10(power(speech) / power(change(f"u{n}", speech, 0) - speech)) for n in range(300)]
    assert (min(drawn), max(drawn)) == (pytest.approx(5, abs=0.5), pytest.approx(20, abs=0.5))
    assert np.mean(drawn) == pytest.approx(12.5, abs=1)  # uniform, of deviation 4.3
    assert np.std(drawn) == pytest.approx(15 / 12**0.5, abs=0.5)


def test_silence_stays_silent(noises, tmp_path):
    silence = torch.zeros(100)
    assert torch.equal(WaveformAugmentation(0, noise=noises)("a", silence, 0), silence)
    soundfile.write(tmp_path / "silent.wav", silence.numpy(), SAMPLE_RATE)
    speech = sine(440, 100)
    assert torch.equal(WaveformAugmentation(0, noise=[tmp_path / "silent.wav"])("a", speech, 0), speech)


def test_in_the_place_of_unusable_noise_comes_other(noises, tmp_path, caplog):
    (tmp_path / "noise.wav").write_bytes(b"none")
    speech = sine(440, 1000)
    change = WaveformAugmentation(0, noise=[tmp_path / "noise.wav", noises[2]], snr_db=(3.0, 3.0))
    for id in "abcdefgh":
        noise = change(id, speech, 0) - speech
        assert 10 * np.log10(power(speech) / power(noise)) == pytest.approx(3, abs=0.01)
    (said,) = caplog.messages
    assert str(tmp_path / "noise.wav") in said
    alone = WaveformAugmentation(0, noise=[tmp_path / "noise.wav"])
    assert torch.equal(alone("a", speech, 0), speech)


@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_of_long_noise_a_part_is_read(tmp_path, monkeypatch, format):
    """Ten minutes at 8 kHz, whose every sample tells its place; the speech is of half a second."""
    places = np.linspace(-1, 1, 600 * 8000)
    soundfile.write(tmp_path / "noise", places, 8000, format=format, subtype="PCM_24")
    read = []
    plain = soundfile.SoundFile.read

    def counting(self, frames=-1, *args, **how):
        read.append(len(found := plain(self, frames, *args, **how)))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    change = WaveformAugmentation(0, noise=[tmp_path / "noise"], snr_db=(0.0, 0.0))
    silence = torch.zeros(8000)
    silence[0] = 1  # of known power
    starts = []
    for id in range(20):
        noise = change(str(id), silence, 0)[1000:7000]  # at a level of its own, so its sign and slope tell
        starts.append(float(noise.mean() / (noise[-1] - noise[0])) * 6000 / 16000 / 300)
    assert max(read) <= 4000
    assert min(starts) < -0.5
    assert max(starts) > 0.5


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seed_epoch_and_id_settle_a_sample(noises):
    def changed(seed: int = 1, id: str = "a", epoch: int = 2) -> bytes:
        torch.manual_seed(torch.seed())  # whatever the global streams hold
        np.random.seed(None)
        return WaveformAugmentation(seed, speeds=SPEEDS, noise=noises)(id, sine(440, 4000), epoch).numpy().tobytes()

    assert changed() == changed()
    assert len({changed(), changed(seed=2), changed(id="b"), changed(epoch=3)}) == 4


def test_workers_processes_and_epochs(tmp_path, noises):
    """What training hears of an utterance doesn't depend on who reads it, and is another thing in each epoch."""
    rows = []
    for n in range(12):
        soundfile.write(tmp_path / f"{n}.wav", sine(300 + 10 * n, 1600 + 10 * n).numpy(), SAMPLE_RATE)
        rows.append(Row(f"u{n}", "x", Recording(tmp_path / f"{n}.wav")))
    seconds = np.linspace(0.1, 0.11, 12)

    def epochs_of(num_workers: int, world_size: int) -> list[dict[str, bytes]]:
        change = WaveformAugmentation(5, speeds=SPEEDS, noise=noises)
        processes = [
            AccumulationLoader(
                bucketed_loader(
                    heard(rows, change),
                    partial(change.lengths, [row.id for row in rows], seconds),
                    batch_size=2,
                    num_workers=num_workers,
                    rank=rank,
                    world_size=world_size,
                ),
                accumulate=1,
            )
            for rank in range(world_size)
        ]
        epochs = []
        for epoch in range(3):
            epochs.append({})
            for steps in processes:
                steps.batch_sampler.sampler.set_epoch(epoch)
                for batch in steps:
                    waveforms = batch.audio.split(batch.audio_sizes)
                    epochs[-1] |= {i: w.numpy().tobytes() for i, w in zip(batch.names, waveforms, strict=True)}
        return epochs

    alone = epochs_of(0, 1)
    assert alone == epochs_of(2, 1) == epochs_of(1, 3)
    assert all(len(epoch) == 12 for epoch in alone)
    assert all(len({epoch[f"u{n}"] for epoch in alone}) == 3 for n in range(12))


# --- masks -----------------------------------------------------------------------------------------------------------


def frames_of(lengths: list[int], width: int = 64) -> torch.Tensor:
    frames = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(0)) + 3
    for x, length in zip(frames, lengths, strict=True):
        x[length:] = 0
    return frames


def masked_by(
    augment: SpecAugment, frames: torch.Tensor, lengths: list[int], ids: Sequence[str], epoch: int = 0
) -> torch.Tensor:
    drawn = [augment(id, length, epoch) for id, length in zip(ids, lengths, strict=True)]
    masks = Masks(pad_sequence([m.frames for m in drawn], batch_first=True), torch.stack([m.channels for m in drawn]))
    return apply_masks(frames, torch.tensor(lengths), masks)


def test_masks_take_the_parts_they_should():
    """Two masks of up to a tenth in each direction: in the mean 2 x 1/20 of the frames, and of the channels."""
    frames = frames_of([200] * 500)
    masked = masked_by(SpecAugment(0, 64), frames, [200] * 500, [f"u{n}" for n in range(500)])
    changed = masked != frames
    time, channels = changed.all(2).float().mean(1), changed.all(1).float().mean(1)
    for part, most in ((time, 0.2), (channels, 12 / 64)):
        assert part.mean() == pytest.approx(most / 2, rel=0.1)  # less where two masks meet
        assert part.max() <= most
        assert part.max() > 0.8 * most
    whole = 1 - (1 - time) * (1 - channels)
    torch.testing.assert_close(changed.float().mean((1, 2)), whole)  # stretches and bands, and nothing else
    places = changed.all(2).float().mean(0)
    assert (places[:100].mean() / places[100:].mean()) == pytest.approx(1, abs=0.15)


def test_masked_values_are_the_mean_of_the_valid_frames():
    lengths = [90, 120, 3]
    frames = frames_of(lengths)
    before = frames.clone()
    masked = masked_by(SpecAugment(4, 64), frames, lengths, ["a", "b", "c"])
    assert torch.equal(frames, before)
    for x, given, length in zip(masked, frames, lengths, strict=True):
        changed = x[:length] != given[:length]
        mean = given[:length].mean(0).expand(length, -1)
        torch.testing.assert_close(x[:length][changed], mean[changed])
        assert changed.any()


def test_masks_depend_on_seed_epoch_and_id_not_on_company():
    def masked(seed: int = 0, epoch: int = 0, ids: tuple[str, ...] = ("a", "b")) -> torch.Tensor:
        frames = frames_of([100, 100])[:1].expand(len(ids), -1, -1)
        return masked_by(SpecAugment(seed, 64), frames, [100] * len(ids), ids, epoch)

    assert torch.equal(masked(), masked())
    assert torch.equal(masked()[1], masked(ids=("c", "b", "a"))[1])
    assert torch.equal(masked()[0], masked(ids=("c", "b", "a"))[2])
    assert not torch.equal(masked()[0], masked()[1])
    assert not torch.equal(masked(), masked(epoch=1))
    assert not torch.equal(masked(), masked(seed=1))


# --- in training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("world")
    return folder, write_world(folder, utterances=10)


def train(world: tuple[Path, list[str]], project: Path, *flags: str) -> None:
    settings = ["--epoch_count=2", "--num_workers=0", f"--proj_dir={project}"]
    assert OPS["train"](Options.parse([*world[1], *settings, *flags])) == 0


def test_training_masks_each_sample_in_each_epoch(world, tmp_path, monkeypatch):
    masked = []
    call = SpecAugment.__call__

    def recorded(self, id, frames, epoch):
        masked.append((epoch, id))
        return call(self, id, frames, epoch)

    monkeypatch.setattr(SpecAugment, "__call__", recorded)
    train(world, tmp_path / "plain")
    assert masked == []
    train(world, tmp_path / "masked", "--spec_augment", f"--valid_split={world[0] / 'train.jsonl'}")
    assert Counter(masked) == {(epoch, f"u{n}"): 1 for epoch in range(2) for n in range(10)}  # not in validation
    plain, changed = (last(tmp_path / name)["speech_encoder.adapter.0.weight"] for name in ("plain", "masked"))
    assert not torch.allclose(plain, changed, rtol=1e-3)


def test_masks_are_of_training_only(world):
    """Without SpecAugment the loss is `model.loss`; with it, another, whatever shares the batch."""
    model = SpeechRWKV.from_pretrained(world[0] / "model.pth", encoder=str(world[0] / "encoder"), adapter_hidden=32)
    speech = [sine(440), sine(300, 2 * SAMPLE_RATE)]
    rows = [Row("a", "a", speech[0]), Row("b", "b", speech[1])]

    def loss(batch_size: int, masks: SpecAugment | None = None) -> torch.Tensor:
        dataset = SpeechDataset(
            rows,
            sample_of=model.sample,
            renderer=model.renderer,
            extract=model.speech_encoder.extract,
            spec_augment=masks,
        )
        batches = list(loader(dataset, batch_size=batch_size, shuffle=False))
        return sum(map(model.loss_sum, batches)) / sum(batch.tokens for batch in batches)

    plain = model.loss(speech, ["a", "b"])
    assert torch.equal(loss(2), plain)
    masked = loss(2, SpecAugment(0, 32))
    assert not torch.isclose(masked, plain, rtol=1e-6)
    torch.testing.assert_close(loss(1, SpecAugment(0, 32)), masked, rtol=1e-5, atol=0)


def test_training_with_all_of_it(world, noises, tmp_path, caplog):
    caplog.set_level(logging.INFO, "rwkv_speech")
    flags = ("--speed_perturb", "--spec_augment", f"--noise_dir={noises[0].parent}", "--noise_snr=-5,5")
    train(world, tmp_path, *flags, "--max_batch_s=3")
    assert "training on 10 utterances" in caplog.text
    assert list(tmp_path.glob("rwkv-adapter-*.pth"))
    with pytest.raises(UserError, match=r"more than the 0\.72 s that --max_batch_s leaves"):
        train(world, tmp_path / "short", "--speed_perturb", "--max_batch_s=0.8")


def test_noise_of_a_level(world, noises, tmp_path):
    """Noise of no power changes nothing; a file that is none is the noise's fault."""

    def trained(name: str, *flags: str) -> torch.Tensor:
        train(world, tmp_path / name, "--epoch_count=1", "--epoch_steps=1", *flags)
        return last(tmp_path / name)["speech_encoder.adapter.0.weight"]

    folder = tmp_path / "noise"
    folder.mkdir()
    for path in noises:
        (folder / path.name).symlink_to(path)
    (folder / "._a.wav").write_bytes(b"of macOS")
    plain, faint = trained("plain"), trained("faint", f"--noise_dir={folder}", "--noise_snr=200,200")
    torch.testing.assert_close(plain, faint, rtol=1e-5, atol=1e-7)
    (folder / "none.wav").write_bytes(b"none")
    with pytest.raises(UserError, match=rf"--noise_dir: {folder / 'none.wav'}: "):
        train(world, tmp_path / "stopped", f"--noise_dir={folder}")
    loud = trained("loud", f"--noise_dir={folder}", "--noise_snr=-5,-5", "--on_bad_audio=skip")
    assert not torch.allclose(plain, loud, rtol=1e-3)
    assert not (tmp_path / "loud" / "bad_audio.jsonl").exists()


@pytest.fixture
def batches(world, tmp_path, monkeypatch):
    """batches(*flags): those of one epoch of training with such flags."""
    step = TrainingModule.training_step

    def run(*flags):
        found = []
        monkeypatch.setattr(TrainingModule, "training_step", lambda self, b, i: found.append(b) or step(self, b, i))
        train(world, tmp_path / str(flags), "--epoch_count=1", *flags)
        return found

    return run


def test_flags_of_augmentation_and_of_batches_by_seconds(world, noises, batches):
    """What training reads beside the files: of what length it is, and how loud what was added."""
    original = {f"u{i}": load_audio(world[0] / f"{i}.wav") for i in range(10)}

    def levels(*flags):
        found = []
        for batch in batches(*flags):
            for name, changed in zip(batch.names, batch.audio.split(batch.audio_sizes), strict=True):
                noise = changed - original[name]
                found.append(10 * math.log10(original[name].square().mean() / noise.square().mean()))
        return found

    folder = f"--noise_dir={noises[0].parent}"
    assert all(-5.1 < level < 5.1 for level in levels(folder, "--noise_snr=-5,5"))
    assert all(4.9 < level < 20.1 for level in levels(folder))

    speeds = []
    for batch in batches("--speed_perturb"):
        speeds += [len(original[name]) / n for name, n in zip(batch.names, batch.samples, strict=True)]
    assert {round(speed, 2) for speed in speeds} == {0.9, 1.0, 1.1}

    by_seconds = [(len(batch), max(batch.seconds)) for batch in batches("--max_batch_s=3")]
    assert all(count * longest <= 3 for count, longest in by_seconds)
    assert sum(count for count, _ in by_seconds) == 10
    assert len(by_seconds) < 10


def test_cached_frames_at_the_drawn_speed(world, tmp_path, batches):
    """What is read of a cache is what the encoder makes of the audio that training without one takes."""
    encoder = SpeechEncoder.from_pretrained(str(world[0] / "encoder"))
    expected = {}
    for batch in batches("--speed_perturb"):
        frames, lengths = encoder(list(batch.audio.split(batch.audio_sizes)))
        expected |= {name: x[:n] for name, x, n in zip(batch.names, frames, lengths, strict=True)}
    speeds = set()
    for batch in batches("--speed_perturb", f"--cache_features={tmp_path / 'cache'}"):
        for name, x, n in zip(batch.names, batch.audio.split(batch.audio_sizes), batch.samples, strict=True):
            torch.testing.assert_close(x.float(), expected.pop(name), rtol=2e-3, atol=2e-3)
            speeds.add(round(len(load_audio(world[0] / f"{name[1:]}.wav")) / n, 2))
    assert (expected, speeds) == ({}, {0.9, 1.0, 1.1})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cache_features=x --noise_dir=y", "--noise_dir changes the audio"),
        ("--noise_snr=0,10", "--noise_snr needs --noise_dir"),
        ("--noise_dir=y --noise_snr=10,0", "expected LOW,HIGH"),
        ("--noise_dir=y --noise_snr=10", "expected LOW,HIGH"),
        ("--max_batch_s=0", "not a positive number"),
    ],
)
def test_flags_that_make_no_sense(flags, words):
    with pytest.raises(UserError, match=words):
        Options.parse(["--load_model=m.pth", *flags.split()])


def test_masks_go_with_cached_frames():
    assert Options.parse(["--load_model=m.pth", "--cache_features=x", "--spec_augment"]).training.spec_augment


def test_a_folder_without_noise_is_an_error(world, tmp_path):
    with pytest.raises(UserError, match="no audio files there"):
        train(world, tmp_path, f"--noise_dir={tmp_path}")

"""Cutting long audio: the network against the package's own run, cuts against silences put in by hand."""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_speech.speech import segments, voice
from rwkv_speech.speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.speech.segments import cut
from rwkv_speech.speech.voice import FRAME, voice_activity

SPEECH = Path(__file__).parents[1].parent / "shared/speech"
CLIPS = sorted((SPEECH / "librivox-5").glob("*.wav"))
needs_speech = pytest.mark.skipif(not CLIPS, reason="../shared/speech is absent")


def noise(seconds: float, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))


# --- the network -----------------------------------------------------------------------------------------------------


def a_voice() -> torch.Tensor:
    """2 s of a buzz at 120 Hz through two resonances, in noise."""
    time = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    buzz = sum(torch.sin(2 * torch.pi * 120 * n * time) / (1 + abs(n * 120 - 700) / 200) for n in range(1, 20))
    return 0.1 * buzz * (1 + torch.sin(2 * torch.pi * 4 * time)) + noise(2, 0.01)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda: noise(2.01), id="noise"),
        pytest.param(a_voice, id="buzz"),
        pytest.param(lambda: load_audio(CLIPS[0]), id="speech", marks=needs_speech),
    ],
)
def test_probabilities_are_those_of_the_package(load):
    samples = load()
    folder = Path(importlib.util.find_spec("silero_vad").origin).parent
    package = torch.jit.load(folder / "data/silero_vad.jit")
    with torch.no_grad():
        expected = package.audio_forward(samples[None], SAMPLE_RATE)[0]
    found, _ = voice_activity()(samples)
    assert len(found) == -(-len(samples) // FRAME)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_memory_goes_on_where_the_last_call_stopped():
    samples = a_voice()
    whole, _ = voice_activity()(samples)
    first, memory = voice_activity()(samples[: 20 * FRAME])
    second, _ = voice_activity()(samples[20 * FRAME :], memory)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-5, rtol=0)
    assert (voice_activity()(samples[20 * FRAME :])[0] - second).abs().max() > 1e-3


def test_a_recording_in_blocks_is_listened_to_as_a_whole(monkeypatch):
    monkeypatch.setattr(segments, "_BLOCK", 10 * FRAME)
    recording = a_voice()
    samples, probabilities = zip(*segments._with_voice(recording.split(7_000)), strict=True)
    assert torch.equal(torch.cat(samples), recording)
    torch.testing.assert_close(torch.cat(probabilities), voice_activity()(recording)[0], atol=1e-5, rtol=0)


def test_the_package_is_not_imported():
    """It would set torch to one thread."""
    voice_activity()
    assert "silero_vad" not in sys.modules


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(voice.UserError, match="pip install"):
        voice._network.__wrapped__()


# --- where it cuts, by hand ------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """Audio whose samples are themselves the probabilities of speech."""
    monkeypatch.setattr(segments, "voice_activity", lambda: lambda samples, memory: (samples[::FRAME], None))


def frames(*runs: tuple[int, float]) -> torch.Tensor:
    return torch.cat([torch.full((count * FRAME,), probability) for count, probability in runs])


QUIET, LOUD = 0.1, 0.9


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        pytest.param([(20, QUIET), (1, LOUD), (10, QUIET)], [(0, 31)], id="short-audio-as-it-is"),
        pytest.param([(31, 0.0)], [], id="short-silence"),
        pytest.param([(32, QUIET)], [], id="only-silence"),
        pytest.param([(40, QUIET), (10, LOUD), (40, QUIET)], [(36, 54)], id="margins-of-4"),
        pytest.param([(5, QUIET), (10, LOUD), (8, QUIET), (20, LOUD)], [(1, 19), (19, 43)], id="middle-of-a-pause"),
        pytest.param([(10, LOUD), (8, QUIET), (5, LOUD), (7, QUIET), (9, LOUD)], [(0, 26), (26, 39)], id="last-pause"),
        pytest.param([(10, LOUD), (7, QUIET), (3, LOUD), (6, QUIET), (9, LOUD)], [(0, 13), (13, 35)], id="6-are-none"),
        pytest.param([(20, LOUD), (100, QUIET), (20, LOUD)], [(0, 24), (116, 140)], id="long-pause"),
        pytest.param([(26, LOUD), (100, QUIET), (5, LOUD)], [(0, 30), (122, 131)], id="pause-at-the-limit"),
        pytest.param([(40, LOUD), (40, QUIET), (5, 0.35)], [(0, 30), (30, 44), (76, 85)], id="threshold"),
        pytest.param([(24, LOUD), (1, 0.5), (20, LOUD)], [(0, 24), (24, 45)], id="no-pause-least-speech"),
        pytest.param([(3, LOUD), (1, 0.5), (26, LOUD), (1, 0.6), (9, LOUD)], [(0, 30), (30, 40)], id="in-second-half"),
        pytest.param([(70, LOUD)], [(0, 30), (30, 60), (60, 70)], id="no-pause-at-all"),
    ],
)
def test_cuts(told, runs, expected):
    """In frames, 31.25 to the second."""
    audio = frames(*runs)
    found = list(cut([audio], max_seconds=1.0))
    assert [(round(s.start * 31.25, 6), round(s.end * 31.25, 6)) for s in found] == expected
    for segment, (start, end) in zip(found, expected, strict=True):
        assert torch.equal(segment.waveform, audio[start * FRAME : end * FRAME])


def test_the_end_of_the_recording_is_that_of_its_last_segment(told):
    audio = frames((50, LOUD))[:-200]
    *_, last = cut([audio], max_seconds=1.0)
    assert last.end == len(audio) / SAMPLE_RATE


def test_it_reads_no_further_than_it_must(told, monkeypatch):
    """What has been read, but is in no segment yet, doesn't grow."""
    monkeypatch.setattr(segments, "_BLOCK", 100 * FRAME)
    read = 0

    def recording():
        nonlocal read
        for _ in range(500):
            block = frames((20, LOUD), (10, QUIET), (7, LOUD), (3, QUIET))
            read += len(block)
            yield block

    behind = [read / SAMPLE_RATE - segment.end for segment in cut(recording(), max_seconds=2.0)]
    assert len(behind) > 300
    assert max(behind) < 2.0 + (100 + 40) * FRAME / SAMPLE_RATE


def test_segments_hold_no_more_memory_than_they_show(told):
    for segment in cut([frames((1000, LOUD))], max_seconds=1.0):
        assert segment.waveform.untyped_storage().nbytes() == 4 * len(segment.waveform)


def test_short_audio_is_not_cut(told):
    audio = frames((400, QUIET), (1, 0.2), (400, QUIET))[:-100]
    (segment,) = cut(audio.split(10_000))
    assert (segment.start, segment.end) == (0.0, len(audio) / SAMPLE_RATE)
    assert torch.equal(segment.waveform, audio)
    assert list(cut([])) == []


def test_a_bound_that_no_number_of_seconds_is_is_met_to_the_sample(told):
    """As a mission file remembers it: 18,001 / 16,000 s; 18,001 / 16,000 * 16,000 is less in floating point."""
    bound = next(n for n in range(16_000, 32_000) if int(n / SAMPLE_RATE * SAMPLE_RATE) < n)
    audio = torch.full((bound + 1,), LOUD)
    assert len(list(cut([audio[:-1]], max_seconds=bound / SAMPLE_RATE))) == 1
    assert len(list(cut([audio], max_seconds=bound / SAMPLE_RATE))) == 2


@pytest.mark.parametrize("seconds", [0.99, 0.0, -1.0, float("nan")])
def test_impossible_lengths(seconds):
    with pytest.raises(ValueError, match="max_seconds must be at least 1"):
        list(cut([noise(2.0)], max_seconds=seconds))


# --- where it cuts, with the network ---------------------------------------------------------------------------------


@needs_speech
@pytest.mark.parametrize("background", [0.0, 0.001], ids=["digital-silence", "hiss"])
@pytest.mark.parametrize("max_seconds", [8.0, 20.0, 30.0], ids=lambda x: f"{x:.0f}s")
def test_cuts_are_made_where_it_is_quiet_and_no_speech_is_lost(max_seconds, background):
    """Recorded sentences, 3 to 7 s each, with 1.2 s of silence between any two."""
    clips = [load_audio(path) for path in CLIPS] * 3
    gap = torch.zeros(round(1.2 * SAMPLE_RATE))
    recording = torch.cat([part for clip in clips for part in (gap, clip)])
    recording += noise(len(recording) / SAMPLE_RATE, background)
    found = list(cut([recording], max_seconds=max_seconds))
    assert len(found) == 15 if max_seconds == 8 else len(found) > 2  # 8 s have no room for two sentences
    assert all(after.end - before.start > max_seconds for before, after in pairwise(found)), "could be joined"

    covered = torch.zeros(len(recording), dtype=torch.bool)
    level = recording[recording.abs() > 0.01].std()
    end = 0
    for segment in found:
        assert len(segment.waveform) <= max_seconds * SAMPLE_RATE
        start, before = round(segment.start * SAMPLE_RATE), end
        end = start + len(segment.waveform)
        assert before <= start
        covered[start:end] = True
        assert torch.equal(segment.waveform, recording[start:end])
        if end < len(recording):  # which stops at once after the last word
            for place in (start, end):
                assert recording[place - 400 : place + 400].std() < 0.2 * level  # 50 ms

    start = 0
    for clip in clips:
        start += len(gap)
        lost = clip[~covered[start : start + len(clip)]]
        assert lost.square().sum() < 1e-3 * clip.square().sum()
        start += len(clip)


@needs_speech
def test_blocks_change_nothing():
    recording = torch.cat([load_audio(path) for path in CLIPS])
    whole = list(cut([recording], max_seconds=6.0))
    sizes = np.random.default_rng(0).integers(1, 40_000, 100).tolist()
    pieces = [x for x in recording.split([*sizes[:10], len(recording) - sum(sizes[:10])]) if len(x)]
    again = list(cut(pieces, max_seconds=6.0))
    assert len(whole) > 3
    assert [s.start for s in whole] == [s.start for s in again]
    assert all(torch.equal(a.waveform, b.waveform) for a, b in zip(whole, again, strict=True))


@needs_speech
def test_speech_without_a_pause_is_cut_but_kept_whole():
    """The clips' own pauses are taken out: 20 s at a stretch that nowhere falls silent."""
    frames_of_speech = []
    for path in CLIPS:
        clip = load_audio(path)
        clip = clip[: len(clip) // FRAME * FRAME].view(-1, FRAME)
        frames_of_speech.append(clip[clip.square().mean(dim=1) > 0.02 * clip.square().mean()])
    stretch = torch.cat(frames_of_speech).flatten()
    found = list(cut([stretch], max_seconds=3.0))
    assert max(segment.end - segment.start for segment in found) <= 3.0
    heard = sum(float(segment.waveform.square().sum()) for segment in found)
    assert heard > 0.999 * float(stretch.square().sum())


@pytest.mark.parametrize("level", [0.0, 1e-40, 0.001, 0.1], ids=["digital-silence", "denormal", "hiss", "noise"])
@pytest.mark.parametrize("seconds", [0.1, 5.0, 35.0])
def test_noise_is_no_speech(level, seconds):
    assert list(cut([noise(seconds, level)])) == []


@needs_speech
@pytest.mark.parametrize("level", [1.0, 0.001])
def test_short_speech_is_heard_however_faint(level):
    for path in CLIPS:
        clip = level * load_audio(path)
        (segment,) = cut([clip])
        assert torch.equal(segment.waveform, clip)


def test_a_short_voice_is_speech_without_a_corpus():
    assert len(list(cut([a_voice()]))) == 1


@pytest.mark.skipif(not (SPEECH / "jfk.flac").exists(), reason="../shared/speech is absent")
def test_speech_is_found_in_noise():
    speech = load_audio(SPEECH / "jfk.flac")
    recording = noise(60.0, 0.01)
    recording[30 * SAMPLE_RATE : 41 * SAMPLE_RATE] += speech
    (segment,) = cut([recording])
    assert 29.5 < segment.start < 31
    assert 40 < segment.end < 41.5

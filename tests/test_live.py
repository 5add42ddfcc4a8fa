"""Live sessions: finals against prediction of the same samples, partials against windows put together by hand."""

import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from rwkv_speech import SpeechRWKV
from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable
from rwkv_speech.live import Final, Live, Partial
from rwkv_speech.mission_file import write_mission_file
from rwkv_speech.missions.task import Task
from rwkv_speech.options import DecodingOptions
from rwkv_speech.speech import endpoint
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, load_audio
from rwkv_speech.speech.endpoint import Endpointer
from rwkv_speech.speech.voice import FRAME
from tests.test_encoder import write_checkpoint
from tests.tiny import at_door

ops = importlib.import_module("rwkv_speech.ops.live")  # the package has the operation itself by that name
MOST = 24  # tokens of an answer
LETTERS = [ord(letter) + 1 for letter in "abcdefghij "]


def answering(world, encoder: str, mission: str = "transcribe") -> SpeechRWKV:
    """A model with a state that matters, whose texts are words of ten letters."""
    torch.manual_seed(8)
    model = SpeechRWKV.from_pretrained(world.model, encoder=encoder, adapter_hidden=16, mission=mission)
    head = model.language_model.head.weight
    others = torch.ones(len(head), dtype=torch.bool)
    others[LETTERS] = False
    head[others] = 0.0
    head[LETTERS[-1]] *= 1.2  # words are short
    model.adapter.layers[2].weight.data *= 2
    for state in model.language_model.time_states:
        torch.nn.init.normal_(state)
    return model


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    """A random Whisper that hears 2 s at once."""
    return str(write_checkpoint(tmp_path_factory.mktemp("encoder") / "whisper", "whisper"))


@pytest.fixture(scope="module")
def model(world) -> SpeechRWKV:
    return answering(world, world.encoder)


@pytest.fixture(scope="module")
def speech(world) -> Tensor:
    """Five recordings, with silence between them and at both ends."""
    silence = torch.zeros(12_345)
    return torch.cat([silence, *(x for path, _ in world.utterances[:5] for x in (load_audio(path), silence))])


def session(live: Live, pieces) -> tuple[list[Final], list[Partial]]:
    events = [event for piece in pieces for event in live.feed(piece)] + live.finish()
    return [e for e in events if isinstance(e, Final)], [e for e in events if isinstance(e, Partial)]


# --- finals ----------------------------------------------------------------------------------------------------------


def test_finals_are_what_prediction_makes_of_their_samples(model, speech, voiced):
    finals, partials = session(model.live(max_new_tokens=MOST), speech.split(700))
    assert len(finals) == 5
    assert partials
    for final in finals:
        waveform = speech[round(final.start * SAMPLE_RATE) : round(final.end * SAMPLE_RATE)]
        assert model.transcribe([waveform], max_new_tokens=MOST) == [final.text]


@pytest.mark.parametrize("pieces", ["of 7 samples", "of all sizes", "at once"])
def test_finals_do_not_depend_on_the_pieces(pieces, model, speech, voiced):
    speech = speech[: 3 * SAMPLE_RATE]
    expected, _ = session(model.live(max_new_tokens=MOST), speech.split(512))
    sizes = {"of 7 samples": [7] * (len(speech) // 7 + 1), "at once": [len(speech)]}.get(pieces)
    rng = np.random.default_rng(0)
    while not sizes or sum(sizes) < len(speech):
        sizes = [*(sizes or []), int(rng.integers(0, 5000))]
    sizes[-1] -= sum(sizes) - len(speech)
    found, _ = session(model.live(max_new_tokens=MOST), speech.split(sizes))
    assert found == expected
    assert len(found) > 1


def test_the_longest_segment_is_cut(model, world, voiced):
    speech = torch.cat([load_audio(path) for path, _ in world.utterances[:5]])
    finals, _ = session(model.live(max_audio_s=1, max_new_tokens=MOST), speech.split(1000))
    assert all(final.end - final.start <= 1 for final in finals)
    assert [final.start for final in finals[1:]] == [final.end for final in finals[:-1]], "it goes on without a gap"
    assert finals[-1].end == pytest.approx(len(speech) / SAMPLE_RATE, abs=1e-3)


# Resident bytes after 20 lengths of audio that no other had, and after 60 more.
LENGTHS = """
import re, sys
from pathlib import Path
import torch
from rwkv_speech import SpeechRWKV

torch.set_num_threads(1)
model = SpeechRWKV.from_pretrained(sys.argv[1], encoder=sys.argv[2], adapter_hidden=16, dtype=torch.bfloat16)
for i in range(80):
    waveform = torch.randn(16_000 + 331 * i if i % 2 else 80_000 - 331 * i)
    with torch.inference_mode():
        model.language_model(model.adapter(*model.speech_encoder([waveform]))[0])
    if i in (19, 79):
        print(int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory a process has")
def test_new_lengths_take_no_more_memory(world):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    command = [sys.executable, "-c", LENGTHS, world.model, world.encoder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 8e6, "270 MB without bounds, 220 MB without torch's, 57 MB without oneDNN's"


# Page faults of a block of 64 MB that is taken and freed four times, once the heap has grown.
BLOCKS = """
import ctypes, rwkv_speech, resource, torch

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page is 4 KiB on every machine
torch.set_num_threads(1)
for i in range(24):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GLIBC = tuple(map(int, re.findall(r"\d+", platform.libc_ver()[1])))


@pytest.mark.skipif(GLIBC < (2, 36), reason="an older glibc, or none, keeps its own rules")
@pytest.mark.parametrize("said", [{}, {"MALLOC_MMAP_THRESHOLD_": "33554432"}], ids=["kept", "as the user says"])
def test_freed_memory_is_kept_for_the_next_block(said):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", BLOCKS]
    done = subprocess.run(command, env=environment | said, capture_output=True, text=True, check=True)
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) > 3.9 * pages if said else int(done.stdout) < 0.1 * pages


# --- partials --------------------------------------------------------------------------------------------------------


def by_hand(
    model: SpeechRWKV,
    wave: Tensor,
    before: Tensor | None = None,
    *,
    step: int = 3,
    right: int = 5120,
    left: int = 10,
    last: int = 400,
    monotonic: bool = False,
    ends: bool = False,
) -> Iterator[tuple[str, str]]:
    """Text and stable text after each step of a segment, from windows as the module's text has them; the language model
    reads all from the beginning each time, and again for each token.

    before: (1, T, C), what it reads before the segment.
    step, left: positions. right: samples. last: samples that the encoder wants for its last frame.
    ends: a pause follows, which no window holds.
    """
    lm, K = model.language_model, model.adapter.downsample_k
    read, text, stable = torch.zeros(1, 0, lm.sizes.n_embd) if before is None else before, b"", b""
    until_of = {end: (end * K - 1) * 320 + last + right for end in range(step, len(wave) // (320 * K) + 1, step)}
    windows = {end: until for end, until in until_of.items() if until <= len(wave)}
    if ends:  # all that is left, as far as there is audio for it
        rest = [end for end in until_of if end not in windows] + [((len(wave) - last) // 320 + 1) // K]
        windows |= dict.fromkeys(rest, len(wave))
    begin = 0
    for end, until in windows.items():
        first = max(0, begin - left)
        frames, lengths = model.speech_encoder([wave[first * K * 320 : until]])
        embeds, _ = model.adapter(frames, lengths)
        read = torch.cat([read, embeds[:, begin - first : end - first]], dim=1)
        begin = end
        if ends and end in rest[:-1]:
            continue
        tokens = [byte + 1 for byte in stable]
        while len(tokens) < MOST:
            hidden, _ = lm(torch.cat([read, lm.emb.weight[[36, *tokens]][None]], dim=1))
            token = int(lm.logits(hidden[0, -1]).argmax())
            if token == 0:
                break
            tokens.append(token)
        old, text = text, bytes(token - 1 for token in tokens)
        if monotonic:
            words, earlier = (re.findall(rb"\s*\S+\s*", x) for x in (text, old))
            same = [w.strip() == e.strip() for w, e in zip(words, earlier, strict=False)]
            count = [*same, False].index(False)
            agreed = b"".join(words[:count])
            stable = max(stable, agreed.rstrip() if count == len(words) else agreed, key=len)
        yield text.decode().strip(), stable.decode().strip()


def changes(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [new for old, new in zip([("", ""), *texts], texts, strict=False) if new != old]


def test_a_partial_is_no_longer_than_what_can_be_said_by_then(model, speech, voiced):
    _, partials = session(model.live(), speech[12_345:].split(1600))
    assert max(len(partial.text) for partial in partials) > 10
    assert all(len(partial.text) <= 50 * partial.audio_ms / 1000 for partial in partials)  # a letter is a token


@pytest.mark.parametrize("mission", ["transcribe", "answer"])
@pytest.mark.parametrize(("family", "last"), [("wavlm", 400), ("whisper", 320)])
@pytest.mark.parametrize(("right", "left"), [(0.0, None), (0.32, 0.5)])
@torch.no_grad()
def test_partials_are_decoded_from_windows(mission, family, last, right, left, world, whisper, voiced):
    model = answering(world, whisper if family == "whisper" else world.encoder, mission)
    wave = torch.cat([load_audio(path) for path, _ in world.utterances[:3]])[: 60 * FRAME]
    wave = torch.cat([wave, torch.zeros(FRAME)])  # the margin, and then a pause
    live = model.live(right=right, left=left, max_new_tokens=MOST)
    _, partials = session(live, torch.cat([wave, torch.zeros(6 * FRAME)]).split(400))
    room = (32_000 - 4_800 - round(right * SAMPLE_RATE)) // 1_600 if family == "whisper" else 99
    positions = {None: 10 if family == "wavlm" else 30, 0.5: 5}[left]
    how = {"right": round(right * SAMPLE_RATE), "left": min(room, positions), "last": last}
    expected = list(by_hand(model, wave, **how, monotonic=mission == "transcribe", ends=True))
    assert [(partial.text, partial.stable) for partial in partials] == changes(expected)
    assert len(partials) > 1
    if family == "wavlm":
        assert any(partial.stable for partial in partials) == (mission == "transcribe")


def test_stable_text_only_grows(model, speech, voiced):
    live, before = model.live(), Partial("", "", 0)
    stable = set()
    for event in (event for piece in speech.split(800) for event in live.feed(piece)):
        if isinstance(event, Partial):
            assert event.text.startswith(event.stable)
            assert event.stable.startswith(before.stable)
            assert event.audio_ms > before.audio_ms
            before = event
            stable.add(event.stable)
        else:
            before = before._replace(stable="")
    assert len(stable) > 1


@pytest.mark.parametrize(
    ("text", "before", "agreed"),
    [
        ("the cat sat", "the cat", "the cat "),  # the next word's space is certain, so "cat" is no "cats" any more
        ("the cat", "the cat", "the cat"),
        ("the cat", "the cat sat", "the cat"),
        ("the cats", "the cat", "the "),
        (" the cat", " the", " the "),
        (" a cat", " the cat", ""),
        ("a cat", "the cat", ""),
        ("the", "", ""),
        ("", "the", ""),
        ("今天天气", "今天天七", "今天天"),
        ("好的 yes", "好的 no", "好的 "),
    ],
)
def test_stable_is_what_two_texts_agree_on(text, before, agreed, model):
    encode, decode = model.tokenizer.encode, model.tokenizer.decode
    assert decode(encode(text)[: model.live()._agreed(encode(text), encode(before))]) == agreed


def test_half_a_character_is_not_stable(model):
    half = model.tokenizer.encode("ab 你")[:4]
    assert model.live()._agreed(half, half) == 3


def test_bounds_that_cannot_be(model):
    for seconds in (0.5, math.nan):
        with pytest.raises(UserError, match="max_audio_s"):
            model.live(max_audio_s=seconds)


# --- sessions --------------------------------------------------------------------------------------------------------


def test_what_is_cancelled_is_forgotten_and_the_end_is_a_beginning(model, speech, voiced):
    expected, _ = session(model.live(max_new_tokens=MOST), [speech])
    live = model.live(max_new_tokens=MOST)
    middle, behind = (round(s * SAMPLE_RATE) // FRAME * FRAME for s in (expected[1].start + 0.4, expected[1].end + 0.1))
    assert [event for event in live.feed(speech[:middle]) if isinstance(event, Final)] == expected[:1]
    live.cancel()
    assert live.finish() == []
    live.feed(torch.zeros(behind - middle))
    assert live.finish() == []
    assert session(live, speech[behind:].split(1000))[0] == expected[2:]


@torch.no_grad()
def test_segments_are_rounds_of_a_conversation(world, speech, voiced):
    model = answering(world, world.encoder, "converse")
    live = model.live(max_new_tokens=MOST)
    finals, partials = session(live, speech.split(800))
    assert live.conversation.rounds == len(finals) == 5
    talk = model.conversation()
    waves = [speech[round(final.start * SAMPLE_RATE) : round(final.end * SAMPLE_RATE)] for final in finals]
    assert ["".join(talk.reply(wave, max_new_tokens=MOST)) for wave in waves] == [final.text for final in finals]

    # The second segment's partials: after the first, "#", its answer and the end of that.
    result = model.decode(model.prepare([model.sample(Row("", None, waves[0]))]), DecodingOptions(max_new_tokens=MOST))
    embeds, _ = model.adapter(*model.speech_encoder([waves[0]]))
    tokens = model.language_model.emb.weight[[36, *result[0].tokens, 0]]
    given = model.conversation(max_audio_s=2.5)
    assert model.live(conversation=given)._max_audio_s == model.live(max_audio_s=2.5).conversation.max_audio_s == 2.5
    "".join(given.reply(waves[0], max_new_tokens=MOST))
    _, partials = session(model.live(conversation=given, max_new_tokens=MOST), waves[1].split(800))
    expected = by_hand(model, waves[1], torch.cat([embeds, tokens[None]], dim=1))
    assert [(partial.text, partial.stable) for partial in partials] == changes(list(expected)) != []
    assert given.rounds == 2


def test_states_are_those_of_the_mission(world, speech, voiced):
    model = SpeechRWKV.from_pretrained(
        world.model, encoder=world.encoder, adapter_hidden=16, mission=["transcribe", "translate"]
    )
    torch.manual_seed(0)
    for state in model.language_model.time_states:
        torch.nn.init.normal_(state)
    texts = {name: session(model.live(mission=name, max_new_tokens=MOST), speech.split(3000)) for name in model.tasks}
    assert texts["transcribe"][0] != texts["translate"][0]
    assert texts["transcribe"][1] != texts["translate"][1]


def test_sixteen_bits_are_floats(model, speech, voiced):
    integers = (speech * 32768).round().to(torch.int16)
    expected = session(model.live(max_new_tokens=MOST), (integers / 32768).split(2000))
    assert session(model.live(max_new_tokens=MOST), integers.split(2000)) == expected
    pieces = (np.frombuffer(piece.numpy().tobytes(), np.int16) for piece in integers.split(2000))
    assert session(model.live(max_new_tokens=MOST), pieces) == expected


def test_what_is_no_audio_is_named(model):
    live = model.live()
    for wrong in (torch.zeros(2, 2), np.zeros(3, np.int32), torch.tensor([float("nan")])):
        with pytest.raises(AudioError, match="live audio"):
            live.feed(wrong)
    assert live.feed([]) == live.finish() == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"step": 0}, "step is 0 s"),
        ({"right": -1}, "right is -1 s"),
        ({"left": float("nan")}, "left is nan s"),
        ({"pause": 0}, "pause is 0 s"),
        ({"mission": "translate"}, "translate"),
    ],
)
def test_what_cannot_be_live(how, message, model):
    with pytest.raises(UserError, match=message):
        model.live(**how)


def test_windows_and_labels_that_cannot_be(world, whisper, model):
    with pytest.raises(UserError, match="more than the 2 s"):
        answering(world, whisper).live(right=1.9)
    labels = SpeechRWKV(model.language_model, model.speech_encoder, model.adapter, tasks=[Task("label", ["a", "b"])])
    with pytest.raises(UserError, match="labels"):
        labels.live()


# --- where segments end, by hand -------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """Audio whose samples are themselves the probabilities of speech."""
    monkeypatch.setattr(endpoint, "voice_activity", lambda: lambda samples, memory: (samples[::FRAME], None))


def frames(*runs: tuple[int, float]) -> Tensor:
    return torch.cat([torch.full((count * FRAME,), probability) for count, probability in runs])


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        pytest.param([(40, 0.1), (10, 0.9), (40, 0.1)], [(39, 51)], id="margins-of-1"),
        pytest.param([(20, 0.1), (30, 0.49), (40, 0.1)], [], id="it-takes-0.5-to-begin"),
        pytest.param([(20, 0.1), (5, 0.4), (1, 0.5), (20, 0.4), (40, 0.1)], [(19, 47)], id="and-0.35-to-go-on"),
        pytest.param([(9, 0.9), (15, 0.3), (9, 0.9), (16, 0.3)], [(0, 34)], id="15-are-no-pause"),
        pytest.param([(9, 0.9), (16, 0.3), (9, 0.9), (16, 0.3)], [(0, 10), (24, 35)], id="16-are"),
        pytest.param([(9, 0.9)], [(0, 9)], id="the-end"),
        pytest.param([(9, 0.9), (3, 0.1)], [(0, 10)], id="the-end-in-silence"),
        pytest.param([(70, 0.9), (20, 0.1)], [(0, 61), (61, 71)], id="longest"),
        pytest.param([(40, 0.9), (8, 0.1), (20, 0.9), (20, 0.1)], [(0, 41), (47, 69)], id="longest-in-a-pause"),
        pytest.param([(62, 0.9), (1, 0.4), (20, 0.1)], [(0, 61), (61, 64)], id="what-goes-on-is-speech"),
        pytest.param([(100, 0.4), (1, 0.9), (20, 0.1)], [(61, 102)], id="longest-of-what-is-none"),
    ],
)
def test_endpoints(told, runs, expected):
    """In frames, 31.25 to the second; segments of at most 62."""
    audio = frames(*runs)
    ends = Endpointer(pause=0.5, longest=2.0)
    found = [segment for piece in audio.split(700) for segment in ends.feed(piece)] + ends.finish()
    assert [(round(s.start * 31.25, 6), round(s.end * 31.25, 6)) for s in found] == expected
    for segment, (start, end) in zip(found, expected, strict=True):
        assert torch.equal(segment.waveform, audio[start * FRAME : end * FRAME])


def test_a_session_holds_one_segment(told):
    ends = Endpointer(pause=0.5, longest=2.0)
    for probability in (0.1, 0.4, 0.9):
        for piece in frames((400, probability)).split(1000):
            ends.feed(piece)
            assert ends._held.samples.untyped_storage().nbytes() <= 4 * FRAME * 63
            assert len(ends._rest) < FRAME


# --- in a terminal, over a pipe --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(world, tmp_path_factory) -> Path:
    """An untrained mission file."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    model = world.speech_rwkv(adapter_hidden=32)
    write_mission_file(folder / "rwkv-adapter-1.pth", model.trainable_state_dict(), model.describe())
    return folder


@pytest.fixture
def shown(world, project, monkeypatch, capsys, voiced):
    """What `--op live` prints, a line each, and its exit status."""

    def run(*flags: str) -> tuple[int, list[str]]:
        given = [*world.flags[:2], *world.flags[3:], f"--proj_dir={project}", "--max_new_tokens=8", *flags]
        status, printed = at_door(monkeypatch, capsys, "--op=live", *given)
        return status, printed.out.splitlines()

    return run


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        ((), {}),
        (("--step_s=0.2", "--right_s=0"), {"step": 0.2, "right": 0}),
        (("--left_s=0", "--pause_s=0.9", "--max_audio_s=1"), {"left": 0, "pause": 0.9, "max_audio_s": 1}),
    ],
)
def test_a_file_is_shown_as_json(flags, how, shown, world, project, speech, tmp_path):
    soundfile.write(tmp_path / "said.wav", speech.numpy(), SAMPLE_RATE, subtype="FLOAT")
    status, lines = shown(f"--file_path={tmp_path / 'said.wav'}", "--format=json", *flags)
    assert status == 0
    found = [json.loads(line) for line in lines]
    kinds = {"partial": Partial, "final": Final}
    events = [kinds[event.pop("type")](**event) for event in found]
    finals, partials = session(
        world.speech_rwkv(adapter=next(project.glob("*.pth"))).live(max_new_tokens=8, **how), speech.split(1600)
    )
    assert [event for event in events if isinstance(event, Final)] == finals != []
    assert [event for event in events if isinstance(event, Partial)] == partials != []


def test_samples_come_through_a_pipe(shown, world, project, speech, monkeypatch):
    samples = (speech[: 3 * SAMPLE_RATE] * 32767).to(torch.int16)
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as pipe:
            data = samples.numpy().tobytes()
            for start in range(0, len(data), 4_001):  # samples are cut in two
                pipe.write(data[start : start + 4_001])
                pipe.flush()

    thread = threading.Thread(target=write)
    thread.start()
    with open(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        status, lines = shown("--file_path", "-")
    thread.join()
    model = world.speech_rwkv(adapter=next(project.glob("*.pth")))
    finals, _ = session(model.live(max_new_tokens=8), [samples])
    assert (status, lines) == (0, [printable(final.text) for final in finals if final.text])
    assert lines


def test_the_microphone_is_heard_until_ctrl_c(shown, world, project, speech, monkeypatch):
    def listen():
        yield from speech[: 2 * SAMPLE_RATE].split(512)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "listen", listen)
    monkeypatch.setattr(ops, "has_microphone", lambda: True)
    model = world.speech_rwkv(adapter=next(project.glob("*.pth")))
    finals, _ = session(model.live(max_new_tokens=8), [speech[: 2 * SAMPLE_RATE]])
    assert shown() == (0, [printable(final.text) for final in finals if final.text])


def test_a_line_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(ops.shutil, "get_terminal_size", lambda: os.terminal_size((9, 24)))
    for event in (
        Partial("the c", "the", 320),
        Partial("the cat sat on", "the cat", 640),  # its end fits
        Partial("\x1b[2J今天", "", 960),
        Final("the cat sat", 0.0, 1.0),
        Final("", 0.0, 1.0),
    ):
        ops._in_terminal(event)
    new = "\r\x1b[K"
    assert capsys.readouterr().out == (
        f"{new}the\x1b[2m c\x1b[0m{new}t\x1b[2m sat on\x1b[0m{new}\x1b[2mb[2J今天\x1b[0m{new}the cat sat\n{new}"
    )


def test_a_file_at_its_own_pace(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(ops.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ops.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    got = []
    for piece in ops._paced(torch.arange(8_000.0).split(1_600)):
        got.append((round(clock[0], 3), len(piece)))
        clock[0] += 0.25 if len(got) == 2 else 0.0  # of computing
    assert got == [(0.1, 1600), (0.2, 1600), (0.5, 4800)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--file_path", "a.wav", "b.wav"], "one file, not 2"),
        (["--file_path=a.wav", "--format=srt"], "--format srt is of whole recordings"),
        (["--file_path=gone.wav"], "gone.wav: no such file"),
        (["--file_path=a.wav", "--step_s=0"], "--step_s"),
        (["--file_path=a.wav", "--right_s=-1"], "--right_s"),
        ([], "pip install sounddevice"),
        (["--op=predict", "--file_path=a.wav", "--step_s=1"], "--step_s goes with --op live"),
    ],
)
def test_what_is_wrong_is_one_line(flags, message, world, project, monkeypatch, capsys):
    monkeypatch.setattr(ops, "has_microphone", lambda: False)
    given = [*world.flags[:2], *world.flags[3:], f"--proj_dir={project}"]
    status, printed = at_door(monkeypatch, capsys, "--op=live", *given, *flags)
    *_, error = printed.err.splitlines()
    assert (status, printed.out) == (2, "")
    assert error.startswith("train.py: ")
    assert message in error

"""The server, in a process of its own: by the official client, by many at a time, by clients that mean no good."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile
import soxr
import torch
import uvicorn
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rwkv_speech import SpeechRWKV
from rwkv_speech.data.sample import Message, Sample
from rwkv_speech.decoding import Rows
from rwkv_speech.live import Final, Live
from rwkv_speech.lm.tokenizer import END_OF_TEXT
from rwkv_speech.mission_file import write_mission_file
from rwkv_speech.ops.serve import _listening
from rwkv_speech.options import DecodingOptions, ServingOptions
from rwkv_speech.serve.api import Served, _Stream
from rwkv_speech.serve.app import make_app
from rwkv_speech.serve.engine import Engine
from rwkv_speech.serve.errors import ApiError
from rwkv_speech.serve.guard import Guard
from rwkv_speech.serve.voice import sentences
from rwkv_speech.session import StrippedStream
from rwkv_speech.speech.audio import load_audio
from rwkv_speech.transcription import FORMATS
from tests.tiny import at_door

ROOT = Path(__file__).parents[1]
MISSIONS = ["transcribe", "translate", "label", "converse"]
KEY = "a-key"
MOST_S = 20  # seconds of audio in a request
TOKENS = 30
VOICE = """
import numpy

class Hibari:  # in the place of the package hibari-tts: speaks characters as samples
    sample_rate = 8000

    def __init__(self, threads):
        pass

    def __call__(self, text):
        return numpy.array([min(ord(c), 32767) for c in text]) / 32767
"""
WORK = ("requests", "sessions", "running", "waiting")  # what /health counts


@dataclass
class Server:
    """A running server, its log, and the model that it has, for what should come of it."""

    port: int
    process: subprocess.Popen
    log: Path
    model: SpeechRWKV
    silent: list[socket.socket]  # connections in which no request has come since the server began

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Authorization": f"Bearer {KEY}"} | headers)
        response = connection.getresponse()
        found = response.status, response.read()
        connection.close()
        return found

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while (health := json.loads(self.ask("GET", "/health")[1])) != {"status": "ok"} | dict.fromkeys(WORK, 0):
            assert time.monotonic() < deadline, health
            time.sleep(0.05)

    def text(self, path: Path, mission: str = "transcribe") -> str:
        """What `predict` says of a recording."""
        return self.model.transcribe([path], mission=mission, max_new_tokens=TOKENS)[0]


@pytest.fixture(scope="module")
def server(world, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    files = []
    for seed, name in enumerate(MISSIONS):
        model = world.speech_rwkv(mission=name, adapter_hidden=16)
        model.task().labels = ["one", "two", "three"] if name == "label" else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor_name, x in model.trainable_state_dict().items():
                x += torch.randn(x.shape, generator=generator) * (1.0 if "time_state" in tensor_name else 0.05)
        files.append(folder / f"my-{name}.pth")
        write_mission_file(files[-1], model.trainable_state_dict(), model.describe())
    log = folder / "log"
    flags = [*world.flags[:2], "--accelerator=cpu", "--port=0", f"--api_key={KEY}", f"--max_new_tokens={TOKENS}"]
    flags += [
        f"--missions={'+'.join(map(str, files))}",
        f"--max_request_s={MOST_S}",
        "--max_body_mb=2",
        "--max_queue=20",
    ]
    flags.append("--speak")
    (folder / "hibari.py").write_text(VOICE)
    environment = os.environ | {"PATH": str(folder), "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", "--op=serve", *flags], stderr=errors, env=environment, cwd=folder
        )
    deadline = time.monotonic() + 60
    while not (found := re.search(r"serving .* at http://127.0.0.1:(\d+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    model = world.speech_rwkv(adapter=files)
    silent = [socket.create_connection(("127.0.0.1", int(found[1]))) for _ in range(2)]
    silent[1].sendall(b"GET / HTTP/1.1\r\nHost: loc")
    yield Server(int(found[1]), process, log, model, silent)
    for connection in silent:
        connection.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 128 + signal.SIGINT)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    """Speech: to the network of the voice activity, the world's tones are none."""
    return sorted((ROOT / "demo/tiny/corpus/test").glob("*.ogg"))[:16]


def wav(seconds: float = 0.5, rate: int = 16_000, loudness: float = 0.3) -> bytes:
    file = io.BytesIO()
    time_ = np.arange(int(seconds * rate)) / rate
    soundfile.write(file, loudness * np.sin(2 * np.pi * 440 * time_), rate, format="WAV")
    return file.getvalue()


# --- the official client ---------------------------------------------------------------------------------------------


def test_transcriptions_in_all_formats(server, paths):
    transcriptions = server.client.audio.transcriptions
    wanted = next(
        server.model.transcripts([paths[0]], mission="transcribe", options=DecodingOptions(max_new_tokens=TOKENS))
    )
    ask = {"file": paths[0], "model": "transcribe"}
    found = transcriptions.create(**ask)
    assert found.text == wanted.text == server.text(paths[0])
    assert found.text
    assert found.usage.seconds == pytest.approx(soundfile.info(paths[0]).duration, abs=1e-3)
    assert transcriptions.create(**ask, response_format="text") == FORMATS["text"](wanted)
    assert transcriptions.create(**ask, response_format="srt").startswith("1\n00:00:00,000 --> ")
    assert transcriptions.create(**ask, response_format="vtt").startswith("WEBVTT\n\n00:00:00.000 --> ")
    verbose = transcriptions.create(
        **ask, response_format="verbose_json", timestamp_granularities=["segment"], language="en", temperature=0
    )
    assert (verbose.task, verbose.language, verbose.text) == ("transcribe", "en", wanted.text)
    (segment,) = verbose.segments
    assert (segment.start, segment.end) == (0.0, wanted.segments[0].end)
    assert segment.avg_logprob == pytest.approx(wanted.segments[0].average_log_prob, abs=1e-4)
    translated = server.client.audio.translations.create(file=paths[0], model="translate")
    assert translated.text == server.text(paths[0], "translate") != wanted.text
    assert server.client.audio.transcriptions.create(file=paths[0], model="my-label.pth").text in (
        "one",
        "two",
        "three",
    )


def test_transcripts_come_piece_by_piece(server, paths):
    events = list(server.client.audio.transcriptions.create(file=paths[1], model="transcribe", stream=True))
    *deltas, done = events
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == server.text(paths[1])
    assert len(deltas) > 3
    assert done.usage.output_tokens >= len(deltas)


def test_models_by_mission_and_by_file(server):
    assert [model.id for model in server.client.models.list()] == MISSIONS
    assert server.client.models.retrieve("my-translate").id == "translate"
    with pytest.raises(openai.NotFoundError, match="transcribe, translate, label, converse"):
        server.client.models.retrieve("whisper-1")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="another", max_retries=0).models.list()


def audio_part(path: Path) -> dict:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "ogg"}}


def test_chat_over_several_rounds_with_audio_and_text(server, paths):
    completions = server.client.chat.completions
    messages, spoken = [], []
    for said in (paths[0], "and then?", paths[2]):
        messages.append({"role": "user", "content": said if isinstance(said, str) else [audio_part(said)]})
        found = completions.create(model="converse", messages=messages)
        spoken.append(Message("user", (said if isinstance(said, str) else load_audio(said),)))
        batch = server.model.prepare([Sample("", tuple(spoken), "converse")])
        answer = server.model.text(server.model.decode(batch, DecodingOptions(max_new_tokens=TOKENS))[0])
        assert found.choices[0].message.content == answer
        assert found.usage.completion_tokens <= TOKENS
        assert found.choices[0].finish_reason == ("length" if found.usage.completion_tokens == TOKENS else "stop")
        chunks = completions.create(
            model="converse", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        *parts, last, usage = chunks
        assert "".join(part.choices[0].delta.content for part in parts) == answer
        assert last.choices[0].finish_reason == found.choices[0].finish_reason
        assert usage.usage == found.usage
        messages.append({"role": "assistant", "content": answer})
        spoken.append(Message("assistant", (answer,)))
    one = [{"role": "user", "content": [audio_part(paths[3])]}]
    assert completions.create(model="translate", messages=one).choices[0].message.content == server.text(
        paths[3], "translate"
    )


def test_a_temperature_draws_and_a_seed_draws_the_same(server, paths):
    def draw(**how) -> str:
        messages = [{"role": "user", "content": [audio_part(paths[0])]}]
        found = server.client.chat.completions.create(model="converse", messages=messages, max_tokens=12, **how)
        return found.choices[0].message.content

    drawn = {draw(temperature=1.5) for _ in range(4)}
    assert len(drawn) > 1
    assert draw(temperature=1.5, seed=7) == draw(temperature=1.5, seed=7)
    assert draw(temperature=1.0, top_p=0, seed=1) == draw()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"model": "nothing"}, "no model 'nothing' here"),
        ({"response_format": "pdf"}, "response_format 'pdf'"),
        ({"timestamp_granularities": ["word"], "response_format": "verbose_json"}, "only those of segments"),
        ({"temperature": 3}, "temperature: expected a number from 0 to 2"),
        ({"prompt": "Rimsky-Korsakov"}, "prompt: goes with the mission answer"),
        ({"language": "Old English"}, "expected a code"),
        ({"extra_body": {"hotwords": "x"}}, "'hotwords' is not known"),
        ({"file": ("x.wav", b"garbage" * 99)}, "cannot be read as audio"),
        ({"file": ("x.webm", b"\x1aE\xdf\xa3" + bytes(500))}, "install ffmpeg"),
        ({"file": ("../../etc/passwd", b"")}, "is empty"),
        ({"file": ("x.wav", wav()[:2000])}, "cut off or damaged"),
        ({"file": ("x.wav", b"RIFF")}, "cannot be read as audio"),
        ({"model": "converse"}, "chat/completions serves it"),
    ],
)
def test_what_is_wrong_is_said_in_the_apis_form(server, paths, how, words):
    with pytest.raises(openai.APIStatusError, match=re.escape(words)) as caught:
        server.client.audio.transcriptions.create(**{"file": paths[0], "model": "transcribe"} | how)
    error = caught.value.body
    assert {*error} == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if caught.value.status_code == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"top_p": 0.5}, "top_p: goes with a temperature above 0"),
        ({"seed": 1}, "seed: goes with a temperature above 0"),
        ({"temperature": 0, "seed": 1}, "seed: goes with a temperature above 0"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ: leave one out"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "include_usage: expected true or false"),
        ({"model": "label", "temperature": 0.5}, "label chooses among labels"),
        ({"model": "label", "max_tokens": 5}, "label chooses among labels"),
    ],
)
def test_a_field_that_would_change_nothing_is_refused(server, paths, how, words):
    messages = [{"role": "user", "content": [audio_part(paths[0])]}]
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        server.client.chat.completions.create(**{"model": "converse", "messages": messages} | how)


# --- many at a time --------------------------------------------------------------------------------------------------


def test_clients_at_a_time_with_three_missions_get_what_predict_says(server, paths):
    wanted = {(path, mission): server.text(path, mission) for path in paths for mission in MISSIONS[:3]}
    assert len({*wanted.values()}) > 20  # so that a mix-up shows

    def ask(what: tuple[Path, str]) -> str:
        return server.client.audio.transcriptions.create(file=what[0], model=what[1]).text

    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        assert dict(zip(wanted, clients.map(ask, wanted), strict=True)) == wanted


def test_more_than_the_queue_holds_are_told_to_come_back(server):
    body, kind = multipart({"model": "transcribe"}, long_wav())

    def ask(_: int) -> tuple[int, bytes]:
        return server.ask("POST", "/v1/audio/transcriptions", body, Content_Type=kind)

    with concurrent.futures.ThreadPoolExecutor(60) as clients:
        found = list(clients.map(ask, range(60)))
    assert {status for status, _ in found} == {200, 429}
    assert len({text for status, text in found if status == 200}) == 1
    busy = next(json.loads(text)["error"] for status, text in found if status == 429)
    assert (busy["code"], busy["type"]) == ("busy", "rate_limit_error")


def test_more_bodies_than_the_queue_holds_are_not_read(server):
    kind = "application/json"
    with contextlib.ExitStack() as uploads:
        for _ in range(20):
            raw = uploads.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            raw.sendall(head("/v1/chat/completions", 1000, kind) + b"{")
        deadline = time.monotonic() + 5
        while (found := server.ask("POST", "/v1/chat/completions", b"{}", Content_Type=kind))[0] != 429:
            assert time.monotonic() < deadline, found
        assert b"busy with 20 uploads" in found[1]
    server.wait_until_idle()
    while server.ask("POST", "/v1/chat/completions", b"{}", Content_Type=kind)[0] != 400:
        assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def endless(world) -> SpeechRWKV:
    """A model whose answers don't end."""
    model = world.speech_rwkv(mission=["transcribe", "converse"], adapter_hidden=16)
    with torch.no_grad():
        model.language_model.head.weight[END_OF_TEXT] = 0  # of 257, some have a logit above 0
    return model


def test_a_client_that_goes_frees_its_place(endless):
    app = make_app(endless, ServingOptions(max_queue=4, max_batch=2))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    served: Served = app.state.served

    def wait(requests: int, running: int, waiting: int) -> None:
        deadline = time.monotonic() + 2
        wanted = {"requests": requests, "running": running, "waiting": waiting}
        while (found := {"requests": served.places.taken} | served.engine.counts) != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.01)

    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with contextlib.ExitStack() as clients:
            for stream in (True, False, True, False):
                asked = {"model": "converse", "messages": [{"role": "user", "content": "x"}], "max_tokens": 10**6}
                body = json.dumps(asked | {"stream": stream}).encode()
                raw = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
                raw.sendall(head("/v1/chat/completions", len(body), "application/json") + body)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # as a killed one leaves it
            wait(requests=4, running=2, waiting=2)
        wait(requests=0, running=0, waiting=0)
    finally:
        server.should_exit = True
        thread.join()


def test_a_reader_who_stops_reading_is_given_up():
    over = []

    async def lines() -> AsyncIterator[str]:
        try:
            yield "more"
        finally:
            over.append(True)

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    made = lines()

    async def main() -> None:
        await asyncio.wait_for(_Stream(await anext(made), made, 0.05)({"type": "http"}, never, never), 5)

    asyncio.run(main())
    assert over


# --- the engine ------------------------------------------------------------------------------------------------------


ASKED = Sample("", (Message("user", ("hello",)),), "converse")


def test_an_answer_that_is_given_up_waits_no_more(endless):
    engine = Engine(endless, most=1)
    with engine.answer(ASKED, DecodingOptions()):
        assert engine.counts["waiting"] == 1
    assert engine.counts["waiting"] == 0


def test_the_engine_outlives_what_fails(endless, monkeypatch):
    async def main() -> None:
        engine = Engine(endless, most=4)
        engine.start(asyncio.get_running_loop())

        async def ask() -> str:
            with engine.answer(ASKED, DecodingOptions(max_new_tokens=5)) as answer:
                return "".join([piece async for piece in answer])

        async def fail(*_: object) -> None:
            for found in await asyncio.gather(ask(), ask(), return_exceptions=True):
                assert "out of order" in str(found)

        def broken(*_: object) -> None:
            raise RuntimeError("out of order")

        wanted = await ask()
        for owner, name in ((StrippedStream, "flush"), (Rows, "step"), (Engine, "_begin"), (Engine, "_step")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                await fail()
            assert await ask() == wanted
            assert engine.counts == {"running": 0, "waiting": 0}
        engine.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_end_of_a_live_segment_keeps_nobody_waiting(endless, said):
    served: Served = make_app(endless, ServingOptions()).state.served
    steps, calls, do = 0, [], served.engine._do

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    def counted(*call: object) -> None:
        before = steps
        do(*call)
        calls.append(steps - before)

    served.engine._do = counted

    def live() -> Live:
        return served.live(served.task("transcribe"), step=60)  # no partials

    async def main() -> list[Final]:
        served.engine.start(asyncio.get_running_loop())
        session, finals = live(), []
        for work in (session.hear(said), session.hear_rest()):
            finals += [event async for event in served.heard(session, work)]
        served.engine.close()
        return finals

    hook = endless.language_model.register_forward_hook(count)
    found = asyncio.run(asyncio.wait_for(main(), 30))
    hook.remove()
    assert steps >= 200, "two answers of 100 tokens"
    assert len(calls) == 2
    assert max(calls) == 0, "none of them while others wait for a call"
    alone = live()
    assert found == alone.feed(said) + alone.finish()


def long_wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(16_000)
        noise = np.random.default_rng(0).normal(0, 3000, 16_000 * 15)
        made.writeframes(noise.astype("<i2").tobytes())
    return file.getvalue()


def multipart(fields: dict[str, str], file: bytes) -> tuple[bytes, str]:
    parts = [f'--xyz\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields.items()]
    disposition = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="/etc/passwd"\r\n\r\n'
    return b"".join([*parts, disposition, file, b"\r\n--xyz--\r\n"]), "multipart/form-data; boundary=xyz"


def head(path: str, length: int, kind: str, more: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n{more}"
    return f"{lines}Content-Length: {length}\r\nContent-Type: {kind}\r\n\r\n".encode()


# --- live ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(paths) -> np.ndarray:
    """Two sentences with a pause between them and after them, 16-bit at 16 kHz."""
    pause = np.zeros(16_000)
    parts = [pause[:8000], load_audio(paths[0]), pause, load_audio(paths[2]), pause]
    return (np.concatenate(parts) * 32767).astype("<i2")


def heard(server: Server, samples: np.ndarray) -> list[Final]:
    live = server.model.live(mission="transcribe", max_new_tokens=TOKENS)
    events = [event for start in range(0, len(samples), 5120) for event in live.feed(samples[start : start + 5120])]
    finals = [event for event in events + live.finish() if isinstance(event, Final)]
    assert len(finals) == 2
    assert finals[0].text != finals[1].text
    return finals


@contextlib.contextmanager
def session(server: Server, **how):
    protocols = ["rwkv-speech", f"openai-insecure-api-key.{KEY}"]
    with connect(f"ws://127.0.0.1:{server.port}/ws", subprotocols=protocols, **how) as socket:
        assert socket.subprotocol == "rwkv-speech"

        def tell(type: str, **what) -> None:
            socket.send(json.dumps({"type": type} | what))

        def until(type: str) -> list[dict]:
            events = []
            while not events or events[-1]["type"] != type:
                found = socket.recv(timeout=30)
                events.append({"type": "voice", "pcm": found} if isinstance(found, bytes) else json.loads(found))
                assert events[-1]["type"] != "error" or type == "error", events
            return events

        yield socket, tell, until


def test_the_pages_session_hears_what_live_hears(server, said):
    wanted = heard(server, said)
    with session(server) as (socket, tell, until):
        tell("start", rate=16_000, mission="transcribe")
        assert until("ready")[0]["mission"] == "transcribe"
        for start in range(0, len(said), 1000):
            socket.send(said[start : start + 1000].tobytes())
        tell("end")
        events = until("ready")
        finals = [event for event in events if event["type"] == "final"]
        assert [(x["text"], x["start"], x["end"]) for x in finals] == [tuple(x) for x in wanted]
        assert any(event["type"] == "partial" for event in events)
        tell("start", rate=48_000, mission="transcribe")  # as browsers have it
        upsampled = soxr.resample(said.astype(np.float32), 16_000, 48_000).astype("<i2")
        socket.send(upsampled[:48_000].tobytes())
        tell("cancel")
        assert not [event for event in until("ready") + until("ready") if event["type"] == "final"]


def letters(text) -> list[str]:
    return [c for c in text if c.isalnum() and ord(c) < 32767]


def test_text_is_spoken_by_sentences():
    assert sentences("It is 3.5 or so. Is it? Ye") == (["It is 3.5 or so.", "Is it?"], "Ye")
    assert sentences("Well...") == ([], "Well..."), "there may be more of it"


def test_the_pages_session_converses(server, said, paths):
    with session(server) as (socket, tell, until), session(server) as (other, tell_other, until_other):
        first, second = ((load_audio(path).numpy() * 32767).astype("<i2") for path in (paths[1], paths[3]))
        talk = server.model.conversation(mission="converse")

        def ask(socket, tell, until, samples: np.ndarray) -> str:
            tell("start", rate=16_000, mission="converse", hands_free=False)
            socket.send(samples.tobytes())
            tell("end")
            events = until("answer.done")
            until("ready")
            deltas = [event["text"] for event in events if event["type"] == "answer.delta"]
            assert "".join(deltas) == events[-1]["text"]
            spoken = np.concatenate([np.frombuffer(x["pcm"], "<i2") for x in events if x["type"] == "voice"])
            assert letters(map(chr, spoken)) == letters(events[-1]["text"]), "and it is spoken"
            return events[-1]["text"]

        def answered(samples: np.ndarray) -> str:
            return "".join(talk.reply(samples.astype(np.float32) / 32768, max_new_tokens=TOKENS))

        assert ask(socket, tell, until, first) == answered(first)
        before = talk.fork()
        then = answered(second)
        assert ask(socket, tell, until, second) == then
        # Another one begins with the same words, knowing nothing of the first.
        assert ask(other, tell_other, until_other, second) != then
        tell("undo")
        assert [event["type"] for event in until("ready")] == ["undone", "ready"]
        tell("undo")
        assert "no round to take back" in until("error")[-1]["message"]
        talk = before
        assert ask(socket, tell, until, second) == answered(second) == then
        tell("reset")
        assert not until("ready")[0]["can_undo"]
        for nonsense in ("[", "{}", '{"type": "start"}', '{"type": "start", "rate": 1e9, "mission": "converse"}'):
            socket.send(nonsense)
            assert until("error")
        socket.send(json.dumps({"type": "undo", "why": "x" * 1000}))
        assert "expected start" in until("error")[-1]["message"]
        # What is too long is refused to its end: nothing is answered.
        tell("start", rate=16_000, mission="converse", hands_free=False)
        until("ready")
        for _ in range(7):
            socket.send(said.tobytes())
        assert "answered in one go" in until("error")[-1]["message"]
        tell("end")
        assert {event["type"] for event in until("ready")} <= {"final", "ready"}, "no answer, only what was heard"
        socket.send(b"odd")
        assert "odd number" in until("error")[-1]["message"]
        # Hands-free: an answer to each sentence, of which the mission that transcribes shows the words.
        tell("start", rate=16_000, mission="converse")
        socket.send(said.tobytes())
        events = until("answer.done") + until("answer.done")
        assert events[-1]["can_undo"]
        assert "final" in [event["type"] for event in events]


def test_a_session_of_another_page_or_too_many_are_refused(server):
    for how in ({"origin": "http://evil.example"}, {"additional_headers": {"Host": "evil.example"}}):
        with pytest.raises(InvalidStatus, match=r"40[03]"), session(server, **how):
            pass
    with pytest.raises(InvalidStatus, match="403"), connect(f"ws://127.0.0.1:{server.port}/ws"):
        pass
    server.wait_until_idle()
    with session(server, origin=f"http://127.0.0.1:{server.port}"), contextlib.ExitStack() as others:
        for _ in range(7):
            others.enter_context(session(server))
        with session(server) as (_, _, until):
            assert "8 live sessions" in until("error")[-1]["message"]


def test_a_session_that_floods_delays_nobody(server, paths, said):
    wanted = server.text(paths[4])
    with session(server) as (socket, tell, until):
        tell("start", rate=16_000, mission="transcribe")
        until("ready")
        start = time.monotonic()
        socket.send(said.tobytes() + bytes(2 * (14 * 16_000 - len(said))))  # 14 s at once, most of them silence
        tell("end")
        assert server.client.audio.transcriptions.create(file=paths[4], model="transcribe").text == wanted
        assert time.monotonic() - start < 5
        until("ready")
        assert time.monotonic() - start >= (14 - 10) / 2, "10 s at once, then 2 s of it in a second"


def test_realtime_transcription_by_the_official_client(server, said):
    wanted = heard(server, said)
    found: dict[str, list] = {}
    with server.client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().type == "session.created"
        heard_as = {"format": {"type": "audio/pcm", "rate": 16_000}, "transcription": {"model": "transcribe"}}
        connection.session.update(session={"type": "transcription", "audio": {"input": heard_as}})
        updated = connection.recv()
        assert (updated.type, updated.session.audio.input.format.rate) == ("session.updated", 16_000)
        for start in range(0, len(said), 8000):
            piece = base64.b64encode(said[start : start + 8000].tobytes()).decode()
            connection.input_audio_buffer.append(audio=piece)
        connection.input_audio_buffer.commit()
        connection.send_raw(b"no text")
        connection.input_audio_buffer.append(audio="!!!")
        while (event := connection.recv()).type != "error":
            found.setdefault(event.type, []).append(event)
        assert "expected text events" in event.error.message
        while (event := connection.recv()).type != "error":
            found.setdefault(event.type, []).append(event)
        assert "no base64" in event.error.message
    kind = "conversation.item.input_audio_transcription"
    assert [event.transcript for event in found[f"{kind}.completed"]] == [final.text for final in wanted]
    first, second = found["input_audio_buffer.committed"]
    assert (first.previous_item_id, second.previous_item_id) == (None, first.item_id)
    for event in found[f"{kind}.completed"]:
        deltas = "".join(x.delta for x in found.get(f"{kind}.delta", ()) if x.item_id == event.item_id)
        assert deltas  # of a model of random weights, stable words need not begin the whole


# --- clients that mean no good ---------------------------------------------------------------------------------------


def flac_bomb() -> bytes:
    """An hour of silence in some kilobytes."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000 * 3600, np.int16), 8000, format="FLAC")
    return file.getvalue()


def chat_body(content: object) -> bytes:
    return json.dumps({"model": "converse", "messages": [{"role": "user", "content": content}]}).encode()


def hostile() -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """name -> path, body, headers."""
    audio, chat = "/v1/audio/transcriptions", "/v1/chat/completions"
    form = {"Content_Type": "multipart/form-data; boundary=xyz"}
    whole, _ = multipart({"model": "transcribe"}, wav())
    loud = io.BytesIO()
    soundfile.write(loud, np.full(8000, 9e14), 16_000, format="WAV", subtype="FLOAT")
    bomb, _ = multipart({"model": "transcribe"}, flac_bomb())
    loudest, _ = multipart({"model": "transcribe"}, loud.getvalue())
    many, _ = multipart({f"f{i}": "x" for i in range(100)}, wav())
    part = {"type": "input_audio", "input_audio": {"data": "!!!", "format": "wav"}}
    bodies = {
        "garbage": b"\x00\xff\xfe{{{[",
        "deep": b"[" * 100_000,
        "surrogate": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        "list": b"[]",
        "null": b"null",
        "huge-number": b'{"model": "converse", "messages": [{"role": "user", "content": "x"}], "seed": 1'
        + b"0" * 4000
        + b"}",
        "nan": b'{"model": "converse", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        "no-base64": json.dumps({"model": "converse", "messages": [{"role": "user", "content": [part]}]}).encode(),
        "wrong-types": json.dumps({"model": 3, "messages": {"role": "user"}}).encode(),
        "message-is-text": json.dumps({"model": "converse", "messages": ["hello"]}).encode(),
        "many-recordings": chat_body([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}] * 65),
        "many-values": b"[" + b"{}," * 100_000 + b"0]",
        "system": json.dumps({"model": "converse", "messages": [{"role": "system", "content": "x"}]}).encode(),
        "much-text": json.dumps(
            {"model": "converse", "messages": [{"role": "user", "content": "x" * 99_999}]}
        ).encode(),
    }
    return {name: (chat, body, {"Content_Type": "application/json"}) for name, body in bodies.items()} | {
        "cut-off-form": (audio, whole[: len(whole) // 2], form),
        "no-form": (audio, b"x" * 100, form),
        "no-boundary": (audio, whole, {"Content_Type": "multipart/form-data"}),
        "many-fields": (audio, many, form),
        "other-type": (audio, whole, {"Content_Type": "text/plain"}),
        "bomb": (audio, bomb, form),
        "loud": (audio, loudest, form),
        "too-large": (audio, b"x" * 2_100_000, form),
        "other-origin": (audio, whole, form | {"Origin": "http://evil.example"}),
        "other-host": (audio, whole, form | {"Host": "evil.example"}),
        "no-origin": (audio, whole, form | {"Origin": "http://["}),
        "no-host": (audio, whole, form | {"Host": "["}),
        "long-header": (audio, whole, form | {"X_Long": "x" * 100_000}),
    }


HOSTILE = hostile()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_are_refused(server, name):
    path, body, headers = HOSTILE[name]
    wanted = {
        "too-large": {413},
        "other-origin": {403},
        "other-host": {403},
        "surrogate": {404},
        "loud": {200, 400},
        "long-header": {200, 400, 431},
    }
    status, found = server.ask("POST", path, body, **headers)
    assert status in wanted.get(name, {400}), found
    if status != 200 and name != "long-header":
        message = json.loads(found)["error"]["message"]
        assert message.count("\n") == 0
        assert {"many-recordings": "64 recordings", "many-values": "100000 values"}.get(name, "") in message


def test_a_body_without_a_length_is_counted(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        kind = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n{kind}".encode()
        )
        for _ in range(30):
            raw.sendall(b"19000\r\n" + b" " * 0x19000 + b"\r\n")
        raw.sendall(b"0\r\n\r\n")
        assert b" 413 " in raw.recv(100)


def test_connections_without_a_request_are_closed(server):
    for connection in server.silent:
        connection.settimeout(15)
        assert connection.recv(100) == b""


@pytest.mark.parametrize(
    ("host", "called", "allowed"),
    [
        ("127.0.0.1", "localhost:8000", True),
        ("127.0.0.2", "127.0.0.2:8000", True),
        ("127.0.0.2", "evil.example", False),
        ("localhost", "evil.example", False),
        ("::1", "[::1]:8000", True),
        ("0.0.0.0", "speech.example", True),
    ],
)
def test_names_of_a_server_that_is_local(host, called, allowed):
    guard = Guard(None, ServingOptions(host=host))
    with contextlib.nullcontext() if allowed else pytest.raises(ApiError, match="its own machine"):
        guard._check("/", {"host": called})


# --- the command line ------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_one_line(world, monkeypatch, capsys, server):
    loading = _listening("127.0.0.1", 0)  # a server that has not read its model yet
    for flags, words in {
        ("--missions=a.pth", "--adapter=b.pth"): "leave one out",
        (f"--port={server.port}",): "--port 0 takes any",
        (f"--port={loading.getsockname()[1]}",): "--port 0 takes any",
        (f"--host={'a' * 70}",): f"--host {'a' * 70} --port 8000: ",
        ("--port=70000",): "expected 0 to 65535",
        ("--api_key=two words",): "which browsers can send",
        ("--api_key=c2VjcmV0a2V5=",): "which browsers can send",
        ("--op=predict", "--file_path=x", "--missions=a"): "--missions goes with --op serve",
    }.items():
        op = () if "--op=predict" in flags else ("--op=serve",)
        status, said = at_door(monkeypatch, capsys, *op, f"--load_model={world.model}", *flags)
        assert status == 2
        assert words in said.err
        assert said.err.count("\n") == 1

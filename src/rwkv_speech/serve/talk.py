"""The websocket of the page: audio in, text back while it is spoken, and answers while they are written.

    to here     start{rate, mission, hands_free}   then binary messages: 16-bit little-endian samples at that rate
                end       what is heard so far is all
                cancel    forget what is being said, and stop answering
                undo      take back the last round;   reset    begin the conversation anew
    back        ready{mission, can_undo, voice_rate}, undone, partial{text, stable, audio_ms}, final{text, start, end},
                answer.delta{text}, answer.done{text, can_undo}, error{message}, closed{reason}

Where there is a voice, binary messages back are the answer of a conversation as it is spoken, sentence by sentence:
16-bit little-endian samples at `voice_rate`.

Where the mission is no transcription, what somebody says is shown by the first one that is, if there is any.
"""

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import torch
from starlette.websockets import WebSocket, WebSocketDisconnect

from rwkv_speech.data.sample import Row
from rwkv_speech.errors import UserError
from rwkv_speech.live import Live
from rwkv_speech.missions.task import Task
from rwkv_speech.serve.api import Served
from rwkv_speech.serve.errors import ApiError, error_body
from rwkv_speech.serve.listening import Pace, Samples
from rwkv_speech.serve.requests import decoding_options
from rwkv_speech.serve.voice import sentences
from rwkv_speech.session import Conversation
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.endpoint import Endpointer

log = logging.getLogger("rwkv_speech")

BACKLOG, MESSAGES = 2_000_000, 1000  # bytes of audio, and messages, that wait at most; then the sender waits
COMMAND = 1000  # characters of the longest command
PAUSE = 0.6  # s of silence after which an answer is due


async def talk(websocket: WebSocket) -> None:
    """One session, from its beginning to its end."""
    served: Served = websocket.app.state.served
    await websocket.accept(subprotocol="rwkv-speech" if "rwkv-speech" in websocket.scope["subprotocols"] else None)
    session = _Session(served, websocket)
    try:
        with served.sessions.one():
            tasks = [asyncio.create_task(work) for work in (session.read(), session.work())]
            try:
                over, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                over.pop().result()
            finally:
                for task in tasks:
                    task.cancel()
    except ApiError as error:
        await session.tell("error", message=str(error))
    except WebSocketDisconnect:
        return
    except Exception as error:
        log.exception("a session was given up")
        await session.tell("error", message=error_body(error)["error"]["message"])
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # where the other side went first
        await session.tell("closed", reason=session.reason)
        await websocket.close()


class _Session:
    """reason: why it is over."""

    def __init__(self, served: Served, websocket: WebSocket) -> None:
        self.served, self.websocket, self.reason = served, websocket, ""
        self.engine, self.model = served.engine, served.engine.model
        self._inbox: deque[bytes | dict[str, Any]] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._interrupted = False
        self._pace = Pace()
        self._samples: Samples | None = None  # once there was a start
        self.task: Task | None = None
        self._talk: Conversation | None = None
        self._hands_free = True

    async def tell(self, type: str, **what: Any) -> None:
        await self.websocket.send_text(json.dumps({"type": type} | what))

    async def read(self) -> None:
        """Takes what comes in until the other side goes, so that a `cancel` is heard while an answer is written."""
        while True:
            try:
                async with asyncio.timeout(self.served.serving.request_timeout):
                    message = await self.websocket.receive()
            except TimeoutError:
                self.reason = "nothing came for a long time"
                return
            if message["type"] == "websocket.disconnect":
                return
            found = message.get("bytes")
            if found is None:
                found = _command(message.get("text") or "")
                self._interrupted = self._interrupted or found.get("type") in ("cancel", "reset")
            self._inbox.append(found)
            self._news.set()
            while sum(map(len, self._inbox)) > BACKLOG or len(self._inbox) > MESSAGES:
                self._room.clear()
                await self._room.wait()

    async def work(self) -> None:
        """Does what comes in, in order."""
        while True:
            while not self._inbox:
                self._news.clear()
                await self._news.wait()
            message = self._inbox.popleft()
            self._room.set()
            try:
                if isinstance(message, bytes):
                    await self._hear(message)
                else:
                    await self._pace.take(0.05)
                    await self._obey(message)
            except UserError as error:
                await self.tell("error", message=str(error))

    async def _obey(self, command: dict[str, Any]) -> None:
        if command.get("type") in ("cancel", "reset"):
            self._interrupted = False
        match command:
            case {"type": "start", "mission": str(mission)}:
                task = self.served.task(mission)
                self._samples = Samples(command.get("rate"), self._pace)
                self._hands_free = command.get("hands_free") is not False
                if self.task != task:
                    self.task = task
                    self._begin()
                self._listen()
                await self._ready()
            case {"type": "end" | "cancel" | "undo" | "reset"} if not self._samples:
                raise ApiError(400, "expected start first")
            case {"type": "end"}:
                await self._hear(b"", last=True)
            case {"type": "cancel"}:
                self._listen()
                await self._ready()
            case {"type": "undo"}:
                if not self._talk:
                    raise ApiError(400, f"{self.task.name} is no conversation: there is nothing to take back")
                self._talk.undo()
                await self.tell("undone")
                await self._ready()
            case {"type": "reset"}:
                self._begin()
                self._listen()
                await self._ready()
            case _:
                raise ApiError(400, "expected start{rate, mission}, end, cancel, undo or reset")

    async def _ready(self) -> None:
        voice = self.served.voice
        can_undo = self._talk is not None and self._talk.can_undo
        await self.tell("ready", mission=self.task.name, can_undo=can_undo, voice_rate=voice.rate if voice else None)

    def _begin(self) -> None:
        """A conversation from its beginning, where the mission is one."""
        longest = self.served.longest[self.task.name]
        is_talk = self.task.mission.rounds
        self._talk = self.model.conversation(mission=self.task.name, max_audio_s=longest) if is_talk else None

    def _listen(self) -> None:
        """Forgets what was heard and not answered."""
        spelling = self.task if self.task.mission.cut else _transcriber(self.model.tasks.values())
        longest = self.served.longest
        self._live: Live | None = None
        if spelling:
            self._live = self.served.live(spelling)
        self._ends = Endpointer(pause=PAUSE, longest=longest[self.task.name])
        self._held: list[np.ndarray] = []
        self._refused = False  # until the end of what was too long

    async def _hear(self, pcm: bytes, *, last: bool = False) -> None:
        if not self._samples:
            raise ApiError(400, "expected start before audio")
        async for piece in self._samples.pieces(pcm, last=last):
            if self._live:
                await self._show(self._live.hear(piece))
            if not self.task.mission.cut:
                await self._take(piece)
        if last:
            if self._live:
                await self._show(self._live.hear_rest())
            if not self.task.mission.cut:
                await self._answer_rest()
            self._listen()
            await self._ready()

    async def _take(self, piece: np.ndarray) -> None:
        if self._hands_free:
            for segment in await self.engine.call(lambda: self._ends.feed(torch.from_numpy(piece))):
                await self._answer(segment.waveform)
            return
        if self._refused:
            return
        self._held.append(piece)
        if sum(map(len, self._held)) > self.served.longest[self.task.name] * SAMPLE_RATE:
            self._held, self._refused = [], True
            raise ApiError(400, f"more than the {self.served.longest[self.task.name]:g} s that are answered in one go")

    async def _answer_rest(self) -> None:
        if self._hands_free:
            for segment in await self.engine.call(self._ends.finish):
                await self._answer(segment.waveform)
        elif self._held:
            await self._answer(torch.from_numpy(np.concatenate(self._held)))
        elif not self._refused:
            raise ApiError(400, "nothing was heard")

    async def _show(self, work: Iterator[Any]) -> None:
        async for event in self.served.heard(self._live, work):
            await self.tell(type(event).__name__.lower(), **event._asdict())

    async def _answer(self, waveform: torch.Tensor) -> None:
        """Writes the answer to what was said; one that is interrupted is as if nothing had been asked."""
        pieces = self._reply(waveform) if self._talk else self._once(waveform)
        text = unspoken = ""
        async for piece in pieces:
            if self._interrupted:
                return
            text += piece
            await self.tell("answer.delta", text=piece)
            over, unspoken = sentences(unspoken + piece)
            for sentence in over:
                await self._say(sentence)
        await self._say(unspoken)
        await self.tell("answer.done", text=text, can_undo=self._talk is not None)

    async def _say(self, sentence: str) -> None:
        if (
            self._talk
            and self.served.voice
            and not self._interrupted
            and (pcm := await self.served.voice.pcm(sentence))
        ):
            await self.websocket.send_bytes(pcm)

    async def _reply(self, waveform: torch.Tensor) -> AsyncIterator[str]:
        search = vars(decoding_options(self.served.options, {}))
        pieces: Iterator[str] = await self.engine.call(lambda: self._talk.reply(waveform, **search))
        while (piece := await self.engine.call(lambda: next(pieces, None))) is not None:
            yield piece

    async def _once(self, waveform: torch.Tensor) -> AsyncIterator[str]:
        sample = self.model.sample(Row("0", None, waveform, mission=self.task.name))
        with self.engine.answer(sample, decoding_options(self.served.options, {})) as answer:
            async for piece in answer:
                yield piece


def _command(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if len(text) <= COMMAND else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _transcriber(tasks: Any) -> Task | None:
    return next((task for task in tasks if task.mission.name == "transcribe"), None)

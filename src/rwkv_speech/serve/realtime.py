"""The websocket of OpenAI's realtime transcription: base64 PCM in, words that stand and finished segments back.

See https://platform.openai.com/docs/guides/realtime-transcription. Deltas are only ever appended: they are words that
are stable; `completed` has the segment as it was heard whole.
"""

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from rwkv_speech.errors import UserError
from rwkv_speech.live import Final, Partial
from rwkv_speech.serve.api import Served
from rwkv_speech.serve.errors import ApiError, error_body
from rwkv_speech.serve.guard import KEY_PROTOCOL
from rwkv_speech.serve.listening import Pace, Samples
from rwkv_speech.serve.requests import base64_bytes
from rwkv_speech.speech.segments import AudioSegment

log = logging.getLogger("rwkv_speech")

RATE = 24_000  # Hz of "audio/pcm"
_NEVER = 1e6  # s
_TRANSCRIPTION = "conversation.item.input_audio_transcription"


async def realtime(websocket: WebSocket) -> None:
    """One session, from its beginning to its end."""
    served: Served = websocket.app.state.served
    offered = [name for name in websocket.scope["subprotocols"] if not name.startswith(KEY_PROTOCOL)]
    await websocket.accept(subprotocol=offered[0] if offered else None)
    session = _Session(served, websocket)
    try:
        with served.sessions.one():
            await session.run()
    except WebSocketDisconnect:
        return
    except TimeoutError:
        await session.fail(ApiError(408, "nothing came for a long time"))
    except UserError as error:
        await session.fail(error)
    except Exception as error:
        log.exception("a session was given up")
        await session.fail(error)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # where the other side went first
        await websocket.close()


class _Session:
    def __init__(self, served: Served, websocket: WebSocket) -> None:
        self.served, self.websocket = served, websocket
        self.id, self._items = f"sess_{uuid.uuid4().hex}", 0
        self._pace = Pace()
        self._sent = ""  # of the segment that is being spoken

    async def run(self) -> None:
        query = self.websocket.query_params
        if query.get("intent") != "transcription":
            raise ApiError(400, "expected intent=transcription: there are no other realtime sessions here")
        cutting = [task.name for task in self.served.engine.model.tasks.values() if task.mission.cut]
        if not cutting and "model" not in query:
            raise ApiError(400, "no mission here transcribes or translates")
        self._begin(query.get("model") or cutting[0], pause=0.5)
        await self._tell("session.created", session=self._described())
        while True:
            async with asyncio.timeout(self.served.serving.request_timeout):
                message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            event: Any = None
            try:
                if (text := message.get("text")) is None:
                    raise ApiError(400, "expected text events, of which audio is base64")
                try:
                    event = json.loads(text)
                except (ValueError, RecursionError):
                    raise ApiError(400, "an event that is no JSON") from None
                await self._pace.take(0.01)
                await self._obey(event)
            except UserError as error:
                await self.fail(error, event.get("event_id") if isinstance(event, dict) else None)

    async def _obey(self, event: Any) -> None:
        match event:
            case {"type": "input_audio_buffer.append", "audio": str(audio)}:
                await self._hear(base64_bytes(audio, "audio"))
            case {"type": "input_audio_buffer.commit"}:
                await self._hear(b"", last=True)
                await self._show(self._live.hear_rest())
            case {"type": "input_audio_buffer.clear"}:
                self._live.cancel()
                self._sent = ""
                await self._tell("input_audio_buffer.cleared")
            case {"type": "session.update" | "transcription_session.update", "session": dict(session)}:
                self._update(session)
                await self._tell("session.updated", session=self._described())
            case _:
                what = "session.update, input_audio_buffer.append, input_audio_buffer.commit, input_audio_buffer.clear"
                raise ApiError(400, f"expected an event of the types {what}", param="type")

    async def _hear(self, pcm: bytes, *, last: bool = False) -> None:
        async for piece in self._samples.pieces(pcm, last=last):
            await self._show(self._live.hear(piece))

    async def _show(self, work: Iterator[AudioSegment | Partial]) -> None:
        async for event in self.served.heard(self._live, work):
            item = {"item_id": self._item(self._items), "content_index": 0}
            text = event.stable if isinstance(event, Partial) else event.text
            if text.startswith(self._sent) and (new := text[len(self._sent) :]):
                await self._tell(f"{_TRANSCRIPTION}.delta", **item, delta=new)
                self._sent = text
            if isinstance(event, Final):
                before = self._item(self._items - 1) if self._items else None
                await self._tell("input_audio_buffer.committed", item_id=item["item_id"], previous_item_id=before)
                usage = {"type": "duration", "seconds": round(event.end - event.start, 3)}
                await self._tell(f"{_TRANSCRIPTION}.completed", **item, transcript=event.text, usage=usage)
                self._items, self._sent = self._items + 1, ""

    def _item(self, number: int) -> str:
        return f"item_{self.id[5:17]}_{number}"

    def _begin(self, model: str, *, pause: float, rate: object = RATE) -> None:
        task = self.served.task(model)
        if not task.mission.cut:
            raise ApiError(400, f"{task.name} neither transcribes nor translates", param="model")
        self._samples = Samples(rate, self._pace)
        self._live = self.served.live(task, pause=pause)
        self._model, self._silence, self._sent = model, pause, ""

    def _update(self, session: dict[str, Any]) -> None:
        """Raises:
        ApiError: it asks for what can't be had here.
        """
        model, pause, rate = self._model, self._silence, self._samples.rate
        match session:
            case {"audio": {"input": dict(heard), **others}, **rest} if not others:
                pass
            case {**rest}:
                heard = {}
        if rest not in ({}, {"type": "transcription"}):
            raise ApiError(400, "session: expected the type transcription and audio.input", param="session")
        for name, value in heard.items():
            match name, value:
                case "transcription", {"model": str(model), **rest} if not any(rest.values()):
                    pass
                case "format", {"type": "audio/pcm", **rest}:
                    rate = rest.get("rate", RATE)
                case "turn_detection", {"type": "server_vad", **rest}:
                    pause = rest.get("silence_duration_ms", 500)
                    if {*rest} - {"silence_duration_ms"} or not isinstance(pause, int) or not 100 <= pause <= 60_000:
                        raise ApiError(400, "turn_detection: only silence_duration_ms can be set", param="session")
                    pause /= 1000
                case "turn_detection", None:
                    pause = _NEVER  # `commit` alone ends a segment, or its length
                case _, None:
                    pass
                case _:
                    raise ApiError(400, f"session.audio.input.{name[:40]}: can't be had here", param="session")
        self._begin(model, pause=pause, rate=rate)

    def _described(self) -> dict[str, Any]:
        vad = {"type": "server_vad", "silence_duration_ms": round(1000 * self._silence)}
        heard = {
            "format": {"type": "audio/pcm", "rate": self._samples.rate},
            "transcription": {"model": self._model},
            "turn_detection": None if self._silence == _NEVER else vad,
        }
        return {"type": "transcription", "id": self.id, "object": "realtime.session", "audio": {"input": heard}}

    async def fail(self, error: Exception, event_id: Any = None) -> None:
        found = error_body(error)["error"] | {"event_id": event_id if isinstance(event_id, str) else None}
        await self._tell("error", error=found)

    async def _tell(self, type: str, **what: Any) -> None:
        event = {"type": type, "event_id": f"event_{uuid.uuid4().hex[:16]}"} | what
        await self.websocket.send_text(json.dumps(event))

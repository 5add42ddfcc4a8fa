"""The HTTP interface: OpenAI's forms of transcription, translation, models and chat; and whether the server is well."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rwkv_speech.data.sample import Message, Row, Sample
from rwkv_speech.live import Final, Live, Partial, final
from rwkv_speech.missions.task import Task
from rwkv_speech.options import DecodingOptions, ServingOptions
from rwkv_speech.serve.engine import Answer, Engine
from rwkv_speech.serve.errors import ApiError, error_body
from rwkv_speech.serve.guard import PATIENCE, BusyError, Places
from rwkv_speech.serve.recordings import Reader, Transcribing
from rwkv_speech.serve.requests import (
    ChatRequest,
    chat_request,
    check_prompt,
    check_search,
    decoding_options,
    one_recording,
    transcription_request,
)
from rwkv_speech.serve.voice import Voice
from rwkv_speech.speech.audio import SAMPLE_RATE, Longest
from rwkv_speech.speech.segments import AudioSegment
from rwkv_speech.transcription import FORMATS, Transcript

log = logging.getLogger("rwkv_speech")

T = TypeVar("T")

SENDING = 5.0  # s beyond the time of a request in which a stream may say that it is over


@dataclass(frozen=True)
class Served:
    """What all requests share.

    names: what a request may call each mission.
    longest: seconds of audio that are decoded in one go, for each mission.
    options: of the search, unless a request says otherwise.
    voice: speaks the answers of conversations; None: they stay text.
    """

    engine: Engine
    reader: Reader
    places: Places
    uploads: Places
    sessions: Places
    serving: ServingOptions
    names: dict[str, str]
    longest: dict[str, float]
    options: DecodingOptions
    voice: Voice | None
    since: int

    def task(self, name: str) -> Task:
        """Raises:
        ApiError: there is none of this name.
        """
        if name not in self.names:
            message = f"there is no model {name[:100]!r} here, but: {', '.join(self.engine.model.tasks)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.engine.model.tasks[self.names[name]]

    def live(self, task: Task, **times: float) -> Live:
        longest = self.longest[task.name]
        return self.engine.model.live(mission=task.name, max_audio_s=longest, **times, **vars(self.options))

    async def heard(self, live: Live, work: Iterator[AudioSegment | Partial]) -> AsyncIterator[Partial | Final]:
        """What a live session makes of audio, of which `live.hear` or `live.hear_rest` is the work.

        The work is one call of the engine; the answers to segments are rows of the batch that all share.
        """
        for event in await self.engine.call(lambda: list(work)):
            if isinstance(event, AudioSegment):
                sample = self.engine.model.sample(Row("", None, event.waveform, mission=live.task.name))
                with self.engine.answer(sample, self.options) as answer:
                    await _all(answer)
                event = final(event, self.engine.model.text(answer.result))
            yield event

    def transcribing(self, audio: bytes, task: Task, search: dict[str, Any], prompt: str | None) -> Transcribing:
        check_search(search, task)
        return Transcribing(
            *(self.engine, self.reader, audio),
            mission=task.name,
            longest=self.longest[task.name],
            options=decoding_options(self.options, search),
            prompt=prompt,
        )


async def transcriptions(request: Request) -> Response:
    return await _transcribe(request, translates=False)


async def translations(request: Request) -> Response:
    return await _transcribe(request, translates=True)


async def _transcribe(request: Request, *, translates: bool) -> Response:
    served: Served = request.app.state.served
    asked = await _read(request, served, transcription_request)
    task = served.task(asked.model)
    if translates and task.mission.name != "translate":
        raise ApiError(400, f"{task.name} is no translation: transcriptions serves it", param="model")
    if task.mission.rounds:
        raise ApiError(400, f"{task.name} is a conversation: chat/completions serves it", param="model")
    check_prompt(asked.prompt, task)
    search = {} if asked.temperature is None else {"temperature": asked.temperature}
    work = served.transcribing(asked.audio, task, search, asked.prompt)
    if asked.stream:
        return await _stream(request, served, _transcript_events(work))
    await _whole(request, served, _all(work))
    transcript = work.transcript
    usage = {"type": "duration", "seconds": round(transcript.seconds, 3)}
    if asked.response_format == "json":
        return JSONResponse({"text": transcript.text, "usage": usage})
    if asked.response_format == "verbose_json":
        return JSONResponse(_verbose(transcript, task, asked.language) | {"usage": usage})
    kind = {"vtt": "text/vtt", "srt": "application/x-subrip"}.get(asked.response_format, "text/plain")
    return PlainTextResponse(FORMATS[asked.response_format](transcript), media_type=kind)


def _verbose(transcript: Transcript, task: Task, language: str | None) -> dict[str, Any]:
    """What is known; the language is what the request says."""
    segments = [
        {"id": i, "start": x.start, "end": x.end, "text": x.text, "avg_logprob": x.average_log_prob}
        | ({} if x.probability is None else {"probability": x.probability})
        for i, x in enumerate(transcript.segments)
    ]
    known = {"task": task.mission.name, "language": language, "duration": round(transcript.seconds, 3)}
    return known | {"text": transcript.text, "segments": segments}


async def _transcript_events(work: Transcribing) -> AsyncIterator[dict[str, Any]]:
    async for piece in work:
        yield {"type": "transcript.text.delta", "delta": piece}
    asked, said = work.tokens
    usage = {"type": "tokens", "input_tokens": asked, "output_tokens": said, "total_tokens": asked + said}
    yield {"type": "transcript.text.done", "text": work.transcript.text, "usage": usage}


async def chat(request: Request) -> Response:
    served: Served = request.app.state.served
    asked = await _read(request, served, chat_request)
    task = served.task(asked.model)
    answering = _Conversing(served, task, asked) if task.mission.rounds else _OneRound(served, task, asked)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        return await _stream(request, served, _chunks(answering, head, asked.usage), done="[DONE]")
    text = "".join(await _whole(request, served, _all(answering)))
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answering.finish_reason, "logprobs": None}
    return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": answering.usage})


class _OneRound:
    """The answer to one recording."""

    def __init__(self, served: Served, task: Task, asked: ChatRequest) -> None:
        audio, prompt = one_recording(asked, task)
        self._work = served.transcribing(audio, task, asked.search, prompt)

    def __aiter__(self) -> AsyncIterator[str]:
        return aiter(self._work)

    @property
    def finish_reason(self) -> str:
        return "stop" if self._work.finished else "length"

    @property
    def usage(self) -> dict[str, int]:
        return _usage(*self._work.tokens)


class _Conversing:
    """The answer to the last of several messages."""

    def __init__(self, served: Served, task: Task, asked: ChatRequest) -> None:
        self._served, self._task, self._asked = served, task, asked
        self._answer: Answer | None = None

    async def __aiter__(self) -> AsyncIterator[str]:
        served, left = self._served, self._served.serving.max_request_s
        longest = served.longest[self._task.name]
        messages = []
        for number, (role, parts) in enumerate(self._asked.messages):
            read = []
            for part in parts:
                if isinstance(part, bytes):
                    most = Longest(min(left, longest), "are answered in one go" if longest < left else "are left here")
                    part = await served.reader.waveform(part, f"the audio of message {number}", most)
                    left = max(0.0, left - len(part) / SAMPLE_RATE)
                read.append(part)
            messages.append(Message(role, tuple(read)))
        sample = Sample(str(len(messages) // 2), tuple(messages), self._task.name)
        with served.engine.answer(sample, decoding_options(served.options, self._asked.search)) as answer:
            async for piece in answer:
                yield piece
        self._answer = answer

    @property
    def finish_reason(self) -> str:
        return "stop" if self._answer.result.finished else "length"

    @property
    def usage(self) -> dict[str, int]:
        return _usage(self._answer.prompt_tokens, self._answer.result.n_scored)


def _usage(asked: int, said: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def _chunks(
    answering: _OneRound | _Conversing, head: dict[str, Any], usage: bool
) -> AsyncIterator[dict[str, Any]]:
    def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return head | {"object": "chat.completion.chunk", "choices": [choice]}

    first = {"role": "assistant"}
    async for piece in answering:
        yield chunk(first | {"content": piece})
        first = {}
    yield chunk(first, answering.finish_reason)
    if usage:
        yield head | {"object": "chat.completion.chunk", "choices": [], "usage": answering.usage}


async def models(request: Request) -> Response:
    served: Served = request.app.state.served
    return JSONResponse(
        {"object": "list", "data": [_model(served, task) for task in served.engine.model.tasks.values()]}
    )


async def model(request: Request) -> Response:
    served: Served = request.app.state.served
    return JSONResponse(_model(served, served.task(request.path_params["name"])))


def _model(served: Served, task: Task) -> dict[str, Any]:
    files = [name for name, mission in served.names.items() if mission == task.name and name != task.name]
    own = {"mission": task.mission.name, "also_called": files}
    return {"id": task.name, "object": "model", "created": served.since, "owned_by": "rwkv-speech"} | own


async def health(request: Request) -> Response:
    served: Served = request.app.state.served
    alive = served.engine.alive
    taken = {"requests": served.places.taken, "sessions": served.sessions.taken}
    state = {"status": "ok" if alive else "failed"} | taken | served.engine.counts
    return JSONResponse(state, 200 if alive else 503)


ROUTES = [
    Route("/health", health),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
    Route("/v1/audio/translations", translations, methods=["POST"]),
    Route("/v1/chat/completions", chat, methods=["POST"]),
]


async def _all(pieces: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in pieces]


async def _in_time(served: Served, work: Awaitable[T]) -> T:
    """Raises:
    ApiError: it takes too long.
    """
    try:
        async with asyncio.timeout(served.serving.request_timeout):
            return await work
    except TimeoutError:
        message = f"the request took longer than the {served.serving.request_timeout:g} s that it may"
        raise ApiError(408, message, code="timeout") from None


async def _read(request: Request, served: Served, read: Callable[[Request], Awaitable[T]]) -> T:
    """What a body asks for. So many of them are in memory at a time; others are let pass by unread."""
    try:
        with served.uploads.one():
            return await _in_time(served, read(request))
    except BusyError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                async for _ in request.stream():
                    pass
        raise


async def _whole(request: Request, served: Served, work: Awaitable[T]) -> T:
    """What is asked, in a place of its own."""
    with served.places.one():
        return await _while_connected(request, _in_time(served, work))


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """What it gives; it is given up when the client goes.

    Raises:
        ClientDisconnect: that happened.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    request: Request, served: Served, events: AsyncIterator[dict[str, Any]], done: str | None = None
) -> Response:
    """Server-sent events. What is wrong before the first one is a status; after that it is an event."""
    lines = _lines(served, events, done)
    over = time.monotonic() + served.serving.request_timeout + SENDING
    first = await _while_connected(request, anext(lines))
    return _Stream(first, lines, over - time.monotonic())


async def _lines(served: Served, events: AsyncIterator[dict[str, Any]], done: str | None) -> AsyncIterator[str]:
    began = False
    with served.places.one():
        deadline = time.monotonic() + served.serving.request_timeout
        try:
            while True:
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        event = await anext(events)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    raise ApiError(408, "the request took longer than it may", code="timeout") from None
                yield f"data: {json.dumps(event)}\n\n"
                began = True
        except Exception as error:
            if not began:
                raise
            yield f"data: {json.dumps(error_body(error))}\n\n"
            return
    if done:
        yield f"data: {done}\n\n"


class _Stream(StreamingResponse):
    """Ends what makes it when the client goes, or reads on so slowly that it takes longer than it may."""

    def __init__(self, first: str, lines: AsyncIterator[str], seconds: float) -> None:
        self._made_by, self._seconds = lines, seconds

        async def body() -> AsyncIterator[str]:
            yield first
            async for line in lines:
                yield line

        super().__init__(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a stream was given up that nobody read for too long")
        finally:
            await self._made_by.aclose()

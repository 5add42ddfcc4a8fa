"""What a request asks for, checked: a field that would change nothing here is refused, not ignored."""

import base64
import binascii
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from rwkv_speech.missions.task import Task
from rwkv_speech.options import DecodingOptions
from rwkv_speech.serve.errors import ApiError

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
MOST_TEXT = 16_384  # characters that are typed in a request
MOST_RECORDINGS = 64  # in a request: they are padded to the longest
_MOST_VALUES = 100_000  # of a body: reading millions of them keeps all others waiting
_FIELDS = 32  # of a form
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]+)*")
_TRANSCRIPTION = {
    *("file", "model", "language", "prompt", "response_format", "stream", "temperature", "timestamp_granularities[]"),
}
_CHAT = {
    *("model", "messages", "stream", "stream_options", "temperature", "top_p", "seed", "n", "user", "modalities"),
    *("max_tokens", "max_completion_tokens", "store"),
}
_ONLY = {"n": (1,), "modalities": (["text"],), "store": (False,)}  # what some fields may say


@dataclass(frozen=True, kw_only=True)
class TranscriptionRequest:
    """Of a form; see https://platform.openai.com/docs/api-reference/audio."""

    audio: bytes
    model: str
    language: str | None
    prompt: str | None
    response_format: str
    stream: bool
    temperature: float | None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """Of a body; see https://platform.openai.com/docs/api-reference/chat.

    messages: by turns of "user" and "assistant"; each a role and parts, which are typed text or encoded audio.
    usage: whether a stream ends with it.
    search: settings of the search that are given.
    """

    model: str
    messages: list[tuple[str, list[str | bytes]]]
    stream: bool
    usage: bool
    search: dict[str, Any]


async def transcription_request(request: Request) -> TranscriptionRequest:
    """Raises:
    ApiError: a field that is wrong, or can't be had here.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "expected multipart/form-data with the fields file and model")
    async with request.form(max_files=1, max_fields=_FIELDS, max_part_size=4 * MOST_TEXT) as form:
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name not in _TRANSCRIPTION:
                raise ApiError(400, f"the field {name[:40]!r} is not known here", param=name[:40])
            if isinstance(value, UploadFile) != (name == "file"):
                raise ApiError(
                    400, f"{name}: expected {'a file' if name == 'file' else 'text, not a file'}", param=name
                )
            if name != "timestamp_granularities[]" and name in fields:
                raise ApiError(400, f"{name} is given twice", param=name)
            fields.setdefault(name, []).append(value)
        if "file" not in fields:
            raise ApiError(400, "there is no file: expected the recording in the field file", param="file")
        audio = await fields.pop("file")[0].read()
    granularities = fields.pop("timestamp_granularities[]", [])
    one = {name: values[0] for name, values in fields.items()}
    format = one.get("response_format", "json")
    if format not in FORMATS:
        raise ApiError(400, f"response_format {format[:40]!r}: expected {', '.join(FORMATS)}", param="response_format")
    if granularities and (set(granularities) != {"segment"} or format != "verbose_json"):
        message = "timestamp_granularities: only those of segments are known, in the format verbose_json"
        raise ApiError(400, message, param="timestamp_granularities")
    stream = one.get("stream", "false").lower()
    if stream not in ("true", "false"):
        raise ApiError(400, f"stream {stream[:40]!r}: expected true or false", param="stream")
    if stream == "true" and format != "json":
        raise ApiError(400, f"a stream has the format json, not {format}", param="response_format")
    language = one.get("language") or None
    if language and not _LANGUAGE.fullmatch(language):
        raise ApiError(400, f"language {language[:40]!r}: expected a code such as en", param="language")
    return TranscriptionRequest(
        audio=audio,
        model=_text(one, "model", required=True),
        language=language,
        prompt=_text(one, "prompt") or None,
        response_format=format,
        stream=stream == "true",
        temperature=_temperature(one.get("temperature") or None),
    )


async def chat_request(request: Request) -> ChatRequest:
    """Raises:
    ApiError: a field that is wrong, or can't be had here.
    """
    encoded = await request.body()
    if sum(map(encoded.count, (b",", b"[", b"{"))) > _MOST_VALUES:  # which base64 has none of
        raise ApiError(400, f"the body has more than {_MOST_VALUES} values")
    try:
        body = json.loads(encoded)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "expected a JSON object with the fields model and messages")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in _CHAT or (name in _ONLY and value not in _ONLY[name]):
            raise ApiError(400, f"{name[:40]}: can't be had here, or not with this value", param=name[:40])
    options = body.get("stream_options", {})
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise ApiError(400, "stream: expected true or false", param="stream")
    if not isinstance(options, dict) or {*options} - {"include_usage"} or (options and not stream):
        message = "stream_options: expected include_usage, and stream beside it"
        raise ApiError(400, message, param="stream_options")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise ApiError(400, "include_usage: expected true or false", param="stream_options")
    search: dict[str, Any] = {}
    if (temperature := _temperature(body.get("temperature"))) is not None:
        search["temperature"] = temperature
    if "top_p" in body and (top_p := _number(body["top_p"], "top_p", 0, 1)) < 1:
        search["top_p"] = top_p or 1e-9  # the likeliest alone
    limits = {_integer(body[name], name, 1) for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: leave one out", param="max_tokens")
    if limits:
        (search["max_new_tokens"],) = limits
    if "seed" in body:
        search["sampling_seed"] = _integer(body["seed"], "seed", 0)
    messages = _messages(body.get("messages"))
    return ChatRequest(
        model=_text(body, "model", required=True),
        messages=messages,
        stream=stream,
        usage=usage,
        search=search,
    )


def decoding_options(base: DecodingOptions, search: Mapping[str, Any]) -> DecodingOptions:
    """The server's options with those of a request; draws without a seed are new ones each time.

    Raises:
        ApiError: top_p or a seed where nothing is drawn.
    """
    if search.get("temperature", base.temperature):
        return replace(base, **{"sampling_seed": secrets.randbits(31)} | dict(search), beam=1)
    for field, param in (("top_p", "top_p"), ("sampling_seed", "seed")):
        if field in search:
            raise ApiError(400, f"{param}: goes with a temperature above 0", param=param)
    return replace(base, **search | {"temperature": 0.0, "top_p": 1.0})


def one_recording(request: ChatRequest, task: Task) -> tuple[bytes, str | None]:
    """The recording, and the typed text before it, of a mission of one round.

    Raises:
        ApiError: something else is asked.
    """
    parts = request.messages[0][1]
    *texts, audio = parts
    takes_text = task.mission.name == "answer"
    if len(request.messages) > 1 or not isinstance(audio, bytes) or len(texts) > takes_text:
        before = ", and one text before it" if takes_text else ""
        message = f"the mission {task.name} answers one message of the user's: one part input_audio{before}"
        raise ApiError(400, message, param="messages")
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "expected one recording", param="messages")
    return audio, texts[0] if texts else None


def check_prompt(prompt: str | None, task: Task) -> None:
    """Raises:
    ApiError: there is one, and the mission takes none.
    """
    if prompt and task.mission.name != "answer":
        raise ApiError(400, f"prompt: goes with the mission answer, not {task.name}", param="prompt")


def check_search(search: Mapping[str, Any], task: Task) -> None:
    """Raises:
    ApiError: the search has a setting, and the mission chooses among labels.
    """
    if task.mission.chooses and any(search.values()):
        raise ApiError(400, f"{task.name} chooses among labels: there is no temperature and no limit of tokens")


def _messages(given: Any) -> list[tuple[str, list[str | bytes]]]:
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages: expected a list of them", param="messages")
    found = []
    for number, message in enumerate(given):
        role = "assistant" if number % 2 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            text = "messages: expected user and assistant by turns, the user first; there is no system message here"
            raise ApiError(400, text, param="messages")
        found.append((role, _parts(message.get("content"), role)))
    if len(found) % 2 == 0:
        raise ApiError(400, "messages: the last one is the assistant's; expected the user's", param="messages")
    if sum(isinstance(part, bytes) for _, parts in found for part in parts) > MOST_RECORDINGS:
        raise ApiError(400, f"messages: more than {MOST_RECORDINGS} recordings", param="messages")
    if sum(len(part) for _, parts in found for part in parts if isinstance(part, str)) > MOST_TEXT:
        raise ApiError(400, f"messages: more than {MOST_TEXT} characters of text", param="messages")
    return found


def _parts(content: Any, role: str) -> list[str | bytes]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[str | bytes] = []
    for part in content if isinstance(content, list) else ():
        match part:
            case {"type": "text", "text": str(text)}:
                parts.append(text)
            case {"type": "input_audio", "input_audio": {"data": str(data), "format": str()}} if role == "user":
                parts.append(base64_bytes(data, "messages"))
            case _:
                raise ApiError(400, "messages: expected parts of the types text and input_audio", param="messages")
    if not parts or (role == "user" and not any(parts)):
        raise ApiError(400, "messages: one has no content", param="messages")
    return parts


def base64_bytes(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: audio that is no base64", param=param) from None


def _text(fields: Mapping[str, Any], name: str, *, required: bool = False) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str) or len(value) > MOST_TEXT or (required and not value):
        raise ApiError(400, f"{name}: expected a text of at most {MOST_TEXT} characters", param=name)
    return value


def _temperature(given: Any) -> float | None:
    return None if given is None else _number(given, "temperature", 0, 2)


def _number(given: Any, name: str, least: float, most: float) -> float:
    try:
        number = float(given) if not isinstance(given, bool) else float("nan")
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not least <= number <= most:
        raise ApiError(400, f"{name}: expected a number from {least:g} to {most:g}", param=name)
    return number


def _integer(given: Any, name: str, least: int) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given < 1 << 31:
        raise ApiError(400, f"{name}: expected a whole number, at least {least}", param=name)
    return given

"""What stands before every request: the key, where it comes from, how large it is; and how many there are at a time."""

import asyncio
import contextlib
import hmac
import ipaddress
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rwkv_speech.options import ServingOptions
from rwkv_speech.serve.errors import ApiError, error_response

KEY_PROTOCOL = (
    "openai-insecure-api-key."  # browsers can't send headers with a websocket: the key is one of its protocols
)
PATIENCE = 10.0  # s
LOCAL = {"127.0.0.1", "localhost", "::1"}


class Guard:
    """Refuses, before anything is read, requests without the key, from pages of other hosts, or that are too large.

    Pages on other hosts could otherwise use a server that only this machine reaches. So the names by which such a
    server is called are checked, too: theirs might be made to lead here.
    """

    def __init__(self, app: ASGIApp, options: ServingOptions) -> None:
        self.app, self.options = app, options
        self.names = LOCAL | {options.host.lower()} if is_local(options.host) else None  # None: any
        self.most = round(options.max_body_mb * 1e6)  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
        except ApiError as error:
            if scope["type"] == "http":
                await self._drain(receive)
                await error_response(None, error)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": str(error)})  # HTTP 403: not accepted
            return
        if scope["type"] == "http":
            receive = self._bounded(receive)
        # A server that ends gives up what is under way, which is no fault to be logged.
        with contextlib.suppress(asyncio.CancelledError):
            await self.app(scope, receive, send)

    def _check(self, path: str, headers: Mapping[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, asking = urlsplit(f"//{host}").hostname, origin and urlsplit(origin).netloc
        except ValueError:
            raise ApiError(400, "Host or Origin: expected a name or an address") from None
        if self.names and name not in self.names:
            raise ApiError(403, "this server is for programs on its own machine; --host lets others in")
        if origin is not None and asking != host:
            raise ApiError(403, "pages of other hosts may not use this server", code="origin")
        if self.options.api_key and (path.startswith("/v1/") or path == "/ws"):
            given = (*_protocols(headers), headers.get("authorization", "").removeprefix("Bearer "))
            keys = [key.removeprefix(KEY_PROTOCOL).encode() for key in given]
            # All are compared, so that the time says nothing.
            if not sum(hmac.compare_digest(key, self.options.api_key.encode()) for key in keys):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.most:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:  # of a body whose length was not said
                await self._drain(receive)
                raise self._too_large()
            return message

        return bounded

    async def _drain(self, receive: Receive) -> None:
        """Lets a client that is refused say what it has to: one that is hung up on doesn't hear why."""
        taken = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while taken < 4 * self.most and (message := await receive()).get("more_body"):
                    taken += len(message["body"])

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than the {self.options.max_body_mb:g} MB that are taken here")


def is_local(host: str) -> bool:
    """Whether only programs on this machine reach a server that listens at an address, or at that of a name."""
    address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    return ipaddress.ip_address(address).is_loopback


def _protocols(headers: Mapping[str, str]) -> list[str]:
    names = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
    return [name for name in names if name.startswith(KEY_PROTOCOL)]


class BusyError(ApiError):
    """All places are taken."""


class Places:
    """So many at a time; whoever comes then is told to come back.

    what: has no more of them.
    """

    def __init__(self, count: int, what: str) -> None:
        self.count, self.taken, self.what = count, 0, what

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Raises:
        BusyError: all are taken.
        """
        if self.taken >= self.count:
            raise BusyError(429, f"the server is busy with {self.count} {self.what}: try again", code="busy")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

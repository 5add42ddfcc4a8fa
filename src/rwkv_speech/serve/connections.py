"""A connection of uvicorn's that is closed when no whole request comes, or nobody takes what was sent last."""

from asyncio import Transport

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from rwkv_speech.serve.guard import PATIENCE


class Connection(AutoHTTPProtocol):
    """uvicorn itself waits without an end for the head of a request, and connections are limited in number.

    One in which twice, `PATIENCE` apart, the same or no request is over and none is under way is closed. Between two
    requests uvicorn's own, shorter time counts.
    """

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._last = None, False
        self.loop.call_later(PATIENCE, self._look)

    def _look(self) -> None:
        if self not in self.connections:  # closed, or a websocket's now
            return
        last, self._last = self._last, (self.cycle, self.transport.is_closing())
        if self._last == last and self.transport.is_closing():
            self.transport.abort()
        elif self._last == last and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        self.loop.call_later(PATIENCE, self._look)

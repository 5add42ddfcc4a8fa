"""The server put together: the engine's thread, what stands before a request, and where each goes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import DecodingOptions, ServingOptions
from rwkv_speech.serve import api
from rwkv_speech.serve.engine import Engine
from rwkv_speech.serve.errors import ApiError, error_response
from rwkv_speech.serve.guard import Guard, Places
from rwkv_speech.serve.realtime import realtime
from rwkv_speech.serve.recordings import Reader
from rwkv_speech.serve.talk import talk
from rwkv_speech.serve.voice import Voice

PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {  # nothing of it comes from elsewhere, and no other page may show it
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def make_app(
    model: SpeechRWKV,
    serving: ServingOptions,
    *,
    files: Mapping[str, str] | None = None,
    longest: Mapping[str, float] | None = None,
    options: DecodingOptions = DecodingOptions(),
) -> Starlette:
    """The application of a server, as uvicorn runs it.

    Args:
        model: with all missions.
        serving: limits, and the key.
        files: what a mission can also be called, and its name: that of its file.
        longest: seconds of audio that are decoded in one go, for each mission; None: `SpeechRWKV.longest_piece`.
        options: of the search, unless a request says otherwise.

    Raises:
        UserError: a mission chooses among labels, and there are none.
    """
    for task in model.tasks.values():
        if task.mission.chooses and not task.labels:
            raise UserError(f"the mission {task.name} chooses among labels: name them by --labels")
    engine = Engine(model, most=serving.max_batch)
    served = api.Served(
        engine=engine,
        reader=Reader(serving.max_request_s),
        places=Places(serving.max_queue, "requests"),
        uploads=Places(serving.max_queue, "uploads"),
        sessions=Places(serving.max_sessions, "live sessions"),
        serving=serving,
        names=dict(files or {}) | {name: name for name in model.tasks},
        longest=dict(longest or {name: model.longest_piece(None, name) for name in model.tasks}),
        options=options,
        voice=Voice() if serving.speak else None,
        since=int(time.time()),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start(asyncio.get_running_loop())
        yield
        engine.close()

    app = Starlette(
        routes=[
            *api.ROUTES,
            WebSocketRoute("/ws", talk),
            WebSocketRoute("/v1/realtime", realtime),
            Route("/", _page),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        lifespan=lifespan,
        middleware=[Middleware(Guard, options=serving)],
        exception_handlers={
            UserError: error_response,
            HTTPException: lambda request, error: error_response(request, ApiError(error.status_code, error.detail)),
            ClientDisconnect: _nobody,
            Exception: error_response,
        },
    )
    app.state.served = served
    return app


async def _page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx calls it; nobody reads it

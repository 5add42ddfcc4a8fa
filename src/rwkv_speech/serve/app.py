"""The server put together: the engine's thread, what stands before a request, and where each goes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import DecodingOptions, ServingOptions
from rwkv_speech.serve import api
from rwkv_speech.serve.engine import Engine
from rwkv_speech.serve.errors import ApiError, error_response
from rwkv_speech.serve.guard import Guard, Places
from rwkv_speech.serve.recordings import Reader


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
        serving=serving,
        names=dict(files or {}) | {name: name for name in model.tasks},
        longest=dict(longest or {name: model.longest_piece(None, name) for name in model.tasks}),
        options=options,
        since=int(time.time()),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start(asyncio.get_running_loop())
        yield
        engine.close()

    app = Starlette(
        routes=api.ROUTES,
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


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx calls it; nobody reads it

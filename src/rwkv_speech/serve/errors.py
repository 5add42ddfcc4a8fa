"""What can't be done, in the form of OpenAI's API."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from rwkv_speech.errors import UserError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(UserError):
    """One line, with a status of HTTP.

    param: the field of the request that is wrong.
    code: a short name for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_body(error: Exception) -> dict[str, Any]:
    """What is wrong, in the API's form. Errors that are none of the user's say nothing of the inside."""
    status = status_of(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = str(error) if isinstance(error, UserError) else "the server failed; its log says why"
    found = {"message": message, "type": kind, "param": None, "code": None}
    if isinstance(error, ApiError):
        found |= {"param": error.param, "code": error.code}
    # Of a request's own words, what no UTF-8 has would end the response.
    return {"error": {name: text and text.encode(errors="replace").decode() for name, text in found.items()}}


def status_of(error: Exception) -> int:
    if isinstance(error, ApiError):
        return error.status
    return 400 if isinstance(error, UserError) else 500


def error_response(request: Request | None, error: Exception) -> JSONResponse:
    status = status_of(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 413: {"Connection": "close"}}
    return JSONResponse(error_body(error), status, headers.get(status))

"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}}, all four in every one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..api.inputs import PromptTooLong
from ..common.shown import shown
from ..engine.request import NOT_NUMBERS
from ..engine.thread import QueueFull

_TYPES = {429: "rate_limit_error", 500: "server_error", 501: "server_error", 503: "unavailable_error", 504: "timeout"}


class ApiError(Exception):
    """The error that a client gets, with its status.

    Args:
        param: the field of the request that is wrong.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}
        text = json.dumps(self.body)  # in ASCII: a name that a client sent may have half of a surrogate pair
        return Response(text, self.status, headers.get(self.status), media_type="application/json")


class Disconnected(Exception):
    """The client has gone."""


@contextmanager
def told_to_the_client() -> Iterator[None]:
    """Turns what a call of AsyncLLM raises into an ApiError."""
    try:
        yield
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full") from error
    except PromptTooLong as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from error
    except (ValueError, TypeError) as error:
        name = re.match(r"\w+", str(error))
        raise ApiError(400, str(error), param=name and name[0]) from error
    except ModuleNotFoundError as error:
        raise ApiError(501, str(error), code="not_installed") from error
    except RuntimeError as error:
        raise ApiError(500, str(error)) from error


def failed_answer(reason: int | str | None) -> ApiError:
    """The error of an answer that ended with "error", whose `stop_reason` is given.

    Logits that are no numbers are the model's fault; that no token may follow is what the request asked for.
    """
    return ApiError(500 if reason == NOT_NUMBERS else 400, str(reason), code="generation_failed")


def install(app: FastAPI) -> None:
    """Makes every error of an app one of these."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Disconnected, _disconnected)
    app.add_exception_handler(Exception, _fault)


def _api_error(_: Request, error: Any) -> Response:
    return error.response()


def _invalid(_: Request, error: Any) -> Response:
    return invalid(error.errors()).response()


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a body that does not validate; `errors`: pydantic's, the first of which the client gets."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if not place and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        what = "the body must be a JSON object, sent with the header content-type: application/json"
        return ApiError(400, what, code="invalid_json")
    name = place[0] if place else None
    got = "" if first["type"] == "missing" else f"; got {shown(first['input'])}"
    return ApiError(400, f"{'.'.join(place)}: {first['msg']}{got}", param=name)


def _http(request: Request, error: Any) -> Response:
    if error.status_code == 404:
        return ApiError(404, f"there is no {request.url.path} here", code="unknown_url").response()
    if error.status_code == 405:
        return ApiError(405, f"{request.url.path} does not take {request.method}", code="method_not_allowed").response()
    cause = error.__cause__  # FastAPI's own message does not name it
    return ApiError(400, f"the body is not valid JSON: {cause or error.detail}", code="invalid_json").response()


def _disconnected(_: Request, error: Any) -> Response:
    return ApiError(499, "the client has gone").response()  # nobody reads it; logs have the status


def _fault(_: Request, error: Any) -> Response:
    return ApiError(500, "an error of this server; its log has the traceback").response()

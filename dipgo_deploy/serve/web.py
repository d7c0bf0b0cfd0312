"""The HTTP side of a server: FastAPI on a ``Service``. Imported only where the extra ``serve`` is needed."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import time
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from typing import Any

import pydantic
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dipgo_deploy import documents
from dipgo_deploy._version import __version__
from dipgo_deploy.errors import NotFiniteError, UserError
from dipgo_deploy.runtime.picture_file import save_picture
from dipgo_deploy.schedule.validation import one_line
from dipgo_deploy.serve.engine import Drawn
from dipgo_deploy.serve.lane import Busy
from dipgo_deploy.serve.schemas import (
    ErrorAnswer,
    ErrorEntry,
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    ModelEntry,
    ModelList,
)
from dipgo_deploy.serve.service import Service, Submitted, UnknownModel

# nginx's, for a client that went away: nobody sees it but logs and metrics.
_GONE = 499
_BODY_SECONDS = 60.0
"""In which the body of a request has to come."""
_KINDS = {401: "authentication_error", 404: "not_found_error"}


class _Failed(Exception):
    """A request that ends with an error. message: for the client."""

    def __init__(self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers


def create_app(service: Service) -> FastAPI:
    """The application; it starts the service when it starts, and stops it when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()
        await asyncio.to_thread(service.join, service.settings.timeout)

    def allowed(request: Request) -> None:
        _check_key(request.headers.get("authorization"), service.settings.api_key)

    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(title="dipgo_deploy", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    guarded: dict[str, Any] = {"dependencies": [Depends(allowed)]}

    @app.exception_handler(_Failed)
    async def failed(request: Request, error: _Failed) -> Response:
        return JSONResponse(_error(error.status, error.message, error.param), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(_error(500, "the server failed; its log says why"), 500)

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process lives and no directory failed to load."""
        return JSONResponse({"status": service.state}, 500 if service.state == "failed" else 200)

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether every directory is loaded and requests are taken."""
        return JSONResponse(
            {"status": service.state, "models": service.states}, 200 if service.state == "ready" else 503
        )

    @app.get("/metrics", **guarded)
    async def metrics() -> Response:
        text, kind = service.metrics.text()
        return Response(text, media_type=kind)

    @app.get("/v1/models", **guarded)
    async def models() -> ModelList:
        return ModelList(data=service.models())

    @app.get("/v1/models/{name}", responses={404: {"model": ErrorAnswer}}, **guarded)
    async def model(name: str) -> ModelEntry:
        found = next((entry for entry in service.models() if entry.id == name), None)
        if found is None:
            raise _Failed(404, f"model: no {name!r} here; see /v1/models", param="model")
        return found

    @app.post(
        "/v1/images/generations",
        response_model=GenerationResponse,
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 422, 500, 503, 504)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": GenerationRequest.model_json_schema()}},
            }
        },
        **guarded,
    )
    async def generate(request: Request) -> Response:
        """Draw pictures."""
        model, status, pictures = "", 500, 0
        try:
            asked = _parsed(await _body(request, service.settings.max_body))
            submitted = await asyncio.to_thread(_submitted, service, asked)  # reading a picture takes its time
            model = submitted.model
            drawn = await _awaited(request, submitted, service.settings.timeout)
            answer = await asyncio.to_thread(_answer, asked, submitted, drawn)
            status, pictures = 200, len(drawn)
            return Response(answer, media_type="application/json")
        except _Failed as error:
            status = error.status
            raise
        finally:
            service.metrics.answered(model, status, pictures)

    return app


def _check_key(header: str | None, key: str | None) -> None:
    """Refuse a request without the bearer token; the comparison takes as long for any other."""
    if key is None:
        return
    scheme, _, token = (header or "").partition(" ")
    # Of bytes: of text compare_digest takes ASCII alone.
    right = hmac.compare_digest(token.strip().encode("latin-1", "replace"), key.encode("latin-1"))
    if scheme.lower() != "bearer" or not right:
        raise _Failed(401, "authorization: a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})


async def _body(request: Request, most: int) -> bytes:
    """The body of a request; what is larger is refused before it is all there."""
    parts, size = [], 0
    close = {"Connection": "close"}
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _Failed(413, f"body: more than the {most} bytes that this server takes", headers=close)
                parts.append(part)
    except TimeoutError:
        raise _Failed(408, f"body: not all there after {_BODY_SECONDS:g} s", headers=close) from None
    except ClientDisconnect:
        raise _Failed(_GONE, "the client went away") from None
    return b"".join(parts)


def _parsed(body: bytes) -> GenerationRequest:
    try:
        return GenerationRequest.model_validate(documents.json_object(body, most=1000))
    except pydantic.ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"]
        raise _Failed(400, one_line(error), param=str(place[0]) if place else None) from None
    except UserError as error:
        raise _Failed(400, f"body: {error}") from None


def _submitted(service: Service, asked: GenerationRequest) -> Submitted:
    try:
        return service.submit(asked)
    except UnknownModel as error:
        raise _Failed(404, str(error), param="model") from None
    except UserError as error:
        raise _Failed(400, str(error), param=_field(str(error))) from None
    except Busy as error:
        raise _Failed(503, str(error), headers={"Retry-After": str(error.seconds)}) from None


# What a pipeline calls otherwise.
_FIELDS = {"class_labels": "class_label", "height": "size", "width": "size", "negative": "negative_prompt"}


def _field(message: str) -> str | None:
    """The field of a request that a message begins with, if it does."""
    name = message.split(" ")[0].rstrip(":")
    name = _FIELDS.get(name, name)
    return name if name in GenerationRequest.model_fields else None


async def _awaited(request: Request, submitted: Submitted, timeout: float) -> list[Drawn]:
    """What was asked for, unless its client goes away or it takes too long: then it is forgotten."""
    pictures = asyncio.wrap_future(submitted.ticket.future)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((pictures, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if pictures.done():
            return pictures.result()
    except NotFiniteError as error:
        # It begins with the directory's path.
        raise _Failed(422, str(error).partition(": ")[2]) from None
    except (CancelledError, asyncio.CancelledError):
        if not pictures.done():  # this task is cancelled: the server stops at once
            raise
        raise _Failed(503, "the server stops; try another", headers={"Retry-After": "1"}) from None
    except Exception:
        raise _Failed(500, f"{submitted.model}: the picture could not be drawn; the server's log says why") from None
    finally:
        gone.cancel()
        pictures.cancel()
        submitted.cancel()
    if gone.done() and not gone.cancelled():
        raise _Failed(_GONE, "the client went away")
    raise _Failed(504, f"not drawn within {timeout:g} s; ask for less, or try again later")


async def _disconnected(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(asked: GenerationRequest, submitted: Submitted, drawn: list[Drawn]) -> bytes:
    """Takes as long as writing the pictures does."""
    data = []
    for wanted, one in zip(submitted.ticket.items, drawn, strict=True):
        file = io.BytesIO()
        save_picture(file, f".{asked.output_format}", one.image, one.parameters)
        data.append(GeneratedImage(b64_json=base64.b64encode(file.getvalue()).decode("ascii"), seed=wanted.seed))
    width, height = drawn[0].image.size
    answer = GenerationResponse(
        created=int(time.time()),
        model=submitted.model,
        size=f"{width}x{height}",
        output_format=asked.output_format,
        data=data,
    )
    return answer.model_dump_json().encode()


def _error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorAnswer(error=ErrorEntry(message=message, type=kind, param=param)).model_dump()

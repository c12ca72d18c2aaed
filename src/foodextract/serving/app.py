"""The HTTP door: what is asked, what is answered, and with which status."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from foodextract import __version__
from foodextract.images import FormatError, ImageError
from foodextract.inference.blip import Answerer
from foodextract.inference.extractor import Confidence
from foodextract.schema import AnswerError, FoodRecord
from foodextract.serving.queue import Batcher, FullError, Limits, ModelFailure, UnavailableError
from foodextract.serving.telemetry import Journal, Meters
from foodextract.serving.uploads import Refusal, Upload, read_images

CLIENT_GONE = 499  # in logs and metrics only
SHOWN = ("Retry-After", "X-Request-Id")  # headers that a page may read, too


@dataclass(frozen=True)
class Settings:
    """All that the command line says about a server, but for its model and address."""

    limits: Limits = field(default_factory=Limits)
    upload: Upload = field(default_factory=Upload)
    api_key: str | None = None  # asked for where images are taken
    origins: tuple[str, ...] = ()  # of web pages that may ask


class Prediction(BaseModel):
    """What an image shows."""

    record: FoodRecord
    confidence: Confidence | None = Field(description="How sure the model was; not calibrated.")
    seconds: dict[str, float] = Field(description="Spent by phase: prepare, queue, model.")


class Problem(BaseModel):
    """Why there is no answer: a reason for programs, a message for people."""

    status: int
    reason: str
    message: str


class Single(Prediction):
    """The answer to one image."""

    model: str


class Batch(BaseModel):
    """The answers to several, in order: each a prediction, or the problem that it would have met alone."""

    model: str
    results: list[Prediction | Problem]


_RECORD = {"is_food": 1, "image_title": "beer and pretzel", "food_items": ["pretzel"], "drink_items": ["beer"]}
_PREDICTION = {
    "record": _RECORD,
    "confidence": {"is_food": 0.998, "food_items": [-0.02], "drink_items": [-0.11]},
    "seconds": {"prepare": 0.004, "queue": 0.011, "model": 0.062},
}
_PROBLEM = {
    "status": 415,
    "reason": "not_a_image",
    "message": "not an image in a format we read: save it as one of JPEG, PNG, …",
}
_REFUSALS = {
    400: "No image, or a form that cannot be read.",
    401: "The API key is missing or wrong.",
    408: "The body came too slowly.",
    413: "The body is too large, or has too many images; told while it streams in.",
    415: "Not an image, by its bytes; names and declared types do not count.",
    422: "Too many pixels (told before decoding), truncated or damaged.",
    429: "All places are taken, or the wait would be longer than the deadline; Retry-After says when to come back.",
    431: "The head of the request is too large.",
    500: "The model failed, or answered what is no record.",
    503: "Not ready yet, or about to stop.",
    504: "No answer before the deadline.",
}


def _documented(example: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    refusals = {status: {"model": Problem, "description": text} for status, text in _REFUSALS.items()}
    refusals[415]["content"] = {"application/json": {"example": _PROBLEM}}
    return {
        "responses": {200: {"content": {"application/json": {"example": example}}}, **refusals},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _form(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"multipart/form-data": {"schema": {"type": "object", "required": [name], "properties": {name: schema}}}}


_FILE = {"type": "string", "format": "binary"}
_RAW = {kind: {"schema": _FILE} for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")}
_ONE = _documented({"model": "tiny-tuned", **_PREDICTION}, _form("image", _FILE) | _RAW)
_MANY = _documented(
    {"model": "tiny-tuned", "results": [_PREDICTION, _PROBLEM]},
    _form("images", {"type": "array", "minItems": 1, "items": _FILE}),
)
_PLAIN = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def create_app(load: Callable[[], Answerer], model: str, settings: Settings) -> FastAPI:
    """The application; `load` is called in the model thread once it starts. Its queue is `app.state.batcher`."""
    meters = Meters()
    batcher = Batcher(load, settings.limits, meters)
    several = replace(
        settings.upload, max_images=min(settings.upload.max_images, settings.limits.places)
    )  # more would never fit

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    app = FastAPI(
        title="FoodExtract Vision", version=__version__, summary="Images in, strict JSON out.", lifespan=lifespan
    )
    app.state.batcher = batcher
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=SHOWN,
    )
    app.add_middleware(Journal, meters=meters)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        request.scope["reason"] = refusal.reason  # for the log
        meters.rejects.labels(refusal.reason).inc()
        return JSONResponse(_problem(refusal).model_dump(), refusal.status, refusal.headers)

    async def admit(credentials: HTTPAuthorizationCredentials | None = Depends(HTTPBearer(auto_error=False))) -> None:  # noqa: B008
        given = credentials.credentials if credentials else ""
        if not secrets.compare_digest(given.encode(), (settings.api_key or "").encode()):
            raise Refusal(401, "bad_key", "send the API key as Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    guarded = [Depends(admit)] if settings.api_key else []

    async def predict_one(image: bytes) -> Prediction:
        try:
            answered = await batcher.answer(image)
        except Exception as error:
            raise _refusal(error, settings.limits.deadline) from error
        return Prediction(record=answered.record, confidence=answered.confidence, seconds=answered.seconds)

    async def predict_all(request: Request, name: str, upload: Upload) -> list[Prediction | Refusal]:
        try:
            with meters.phases.labels("total").time(), batcher.place():
                with meters.phases.labels("upload").time():
                    images = await read_images(request, name, upload)
                with batcher.further(len(images) - 1):
                    work = asyncio.gather(*map(predict_one, images), return_exceptions=True)
                    return await _while_connected(request, work)
        except (FullError, UnavailableError, ClientDisconnect) as error:
            raise _refusal(error, settings.limits.deadline) from error

    @app.post("/predict", dependencies=guarded, tags=["images"], **_ONE)
    async def predict(request: Request) -> Single:
        """One image: the form field `image`, or the body itself.

        `curl -F image=@lunch.jpg http://localhost:8000/predict`, or `curl --data-binary @lunch.jpg http://localhost:8000/predict`.
        Of an animation the first frame counts.
        """
        [result] = await predict_all(request, "image", replace(settings.upload, max_images=1))
        if isinstance(result, BaseException):
            raise result
        return Single(model=model, **result.model_dump())

    @app.post("/predict/batch", dependencies=guarded, tags=["images"], **_MANY)
    async def predict_batch(request: Request) -> Batch:
        """Several images, each in a form field `images`; a bad one among them has its problem, the others are answered all the same.

        `curl -F images=@a.jpg -F images=@b.jpg http://localhost:8000/predict/batch`
        """
        results = await predict_all(request, "images", several)
        for result in results:
            if isinstance(result, Refusal):
                meters.rejects.labels(result.reason).inc()
            elif isinstance(result, BaseException):
                raise result
        return Batch(model=model, results=[_problem(r) if isinstance(r, Refusal) else r for r in results])

    @app.get("/health", tags=["operation"], response_class=PlainTextResponse, responses={200: _PLAIN, 503: _PLAIN})
    async def health() -> PlainTextResponse:
        """Is the process alive? 503 when only a new one can help."""
        return PlainTextResponse("ok") if batcher.healthy else PlainTextResponse("the model fails, or hangs", 503)

    @app.get("/ready", tags=["operation"], response_class=PlainTextResponse, responses={200: _PLAIN, 503: _PLAIN})
    async def ready() -> PlainTextResponse:
        """Is the model warm, and nobody about to stop it?"""
        return PlainTextResponse(batcher.unavailable or "ready", 503 if batcher.unavailable else 200)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse, responses={200: _PLAIN})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _problem(refusal: Refusal) -> Problem:
    return Problem(status=refusal.status, reason=refusal.reason, message=refusal.message)


def _refusal(error: Exception, deadline: float) -> Refusal:
    """Which status and reason an error has."""
    match error:
        case FormatError():
            return Refusal(415, "not_a_image", str(error))
        case ImageError():
            return Refusal(422, "bad_image", str(error))
        case FullError():
            return Refusal(429, "queue_full", str(error), {"Retry-After": str(error.retry_after)})
        case UnavailableError():
            return Refusal(503, str(error), f"{error}: try again in a moment, or elsewhere", {"Retry-After": "5"})
        case TimeoutError():
            return Refusal(504, "deadline", f"no answer within {deadline:g} s")
        case ClientDisconnect():
            return Refusal(CLIENT_GONE, "client_gone", "the client hung up")
        case ModelFailure():
            return Refusal(500, "model_failed", "the model could not answer")
        case AnswerError():  # its text is not told: it quotes what the model made of the image
            return Refusal(500, "bad_answer", "what the model answered is no record")
        case _:
            raise error


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives, unless the client hangs up first: then it is cancelled, and ClientDisconnect raised."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(hang_up())
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        work.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await work

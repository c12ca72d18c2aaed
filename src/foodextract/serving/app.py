"""The HTTP API: endpoints, response models, documentation."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from foodextract import __version__
from foodextract.inference.blip import Answerer
from foodextract.serving.errors import Problem, RequestError
from foodextract.serving.queue import Prediction, Queue, QueueLimits
from foodextract.serving.telemetry import RequestLog, ServerMetrics
from foodextract.serving.uploads import UploadLimits, read_images


@dataclass(frozen=True)
class Settings:
    """Server settings other than the model and the address."""

    queue: QueueLimits = field(default_factory=QueueLimits)
    upload: UploadLimits = field(default_factory=UploadLimits)
    api_key: str | None = None  # required by the endpoints that take images
    origins: tuple[str, ...] = ()  # web pages that may call the server
    root_path: str = ""  # the prefix that a proxy strips


class Single(Prediction):
    """The answer to one image."""

    model: str


class Batch(BaseModel):
    """The answers to several images, in order: for each a prediction or its error."""

    model: str
    results: list[Prediction | Problem]


STATUSES = {
    400: "No image, or an unreadable form.",
    401: "The API key is missing or wrong.",
    408: "The body came too slowly.",
    413: "The body is too large or has too many images; sent while the body streams in.",
    415: "The bytes are not an image. File names and content types are ignored.",
    422: "Too many pixels (checked before decoding), or a truncated or damaged image.",
    429: "The queue is full, or the wait would exceed the deadline. Retry-After says when to retry.",
    431: "The request headers are too large.",
    500: "The model failed, or its answer is not a record.",
    503: "The model is loading, or the server is shutting down.",
    504: "No answer before the deadline.",
}
PREDICTION = {
    "record": {"is_food": 1, "image_title": "beer and pretzel", "food_items": ["pretzel"], "drink_items": ["beer"]},
    "confidence": {"is_food": 0.998, "food_items": [0.93], "drink_items": [0.81]},
    "seconds": {"prepare": 0.004, "queue": 0.011, "model": 0.062},
}
PROBLEM = {"status": 415, "reason": "not_an_image", "message": "not an image in a format we read: save it …"}
FILE = {"type": "string", "format": "binary"}
BASE64 = {"type": "string", "description": "Base64, or a data URL (`data:image/jpeg;base64,…`)."}


def _openapi(
    field: str, schema: dict[str, Any], text: dict[str, Any], example: dict[str, Any], *raw_types: str
) -> dict[str, Any]:
    """Describe the body, which FastAPI cannot derive because we read it ourselves, and the errors."""
    form: dict[str, Any] = {"type": "object", "required": [field], "properties": {field: schema}}
    json_body: dict[str, Any] = {"type": "object", "required": [field], "properties": {field: text}}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": json_body}}
    content |= {kind: {"schema": FILE} for kind in raw_types}
    errors = {status: {"model": Problem, "description": meaning} for status, meaning in STATUSES.items()}
    return {
        "responses": {200: {"content": {"application/json": {"example": {"model": "tiny", **example}}}}, **errors},
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "tags": ["images"],
    }


RAW = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
ONE = _openapi("image", FILE, BASE64, PREDICTION, *RAW)
LIST = {"type": "array", "minItems": 1}
MANY = _openapi("images", LIST | {"items": FILE}, LIST | {"items": BASE64}, {"results": [PREDICTION, PROBLEM]})
PROBE: dict[str, Any] = {"tags": ["operation"], "response_class": PlainTextResponse}


def create_app(load: Callable[[], Answerer], model: str, settings: Settings) -> FastAPI:
    """Build the application. `load` runs in the model thread at startup. The queue is `app.state.queue`."""
    metrics = ServerMetrics()
    queue = Queue(load, settings.queue, metrics)
    bearer = HTTPBearer(auto_error=False)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with queue.running():
            yield

    async def check_key(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        given = credentials.credentials if credentials else ""
        if not secrets.compare_digest(given.encode(), (settings.api_key or "").encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "bad_key", "send the API key as Authorization: Bearer …", headers)

    async def predictions(request: Request, field: str, max_images: int) -> list[Prediction | RequestError]:
        with metrics.phases.labels("total").time(), queue.slot():
            with metrics.phases.labels("upload").time():
                images = await read_images(request, field, replace(settings.upload, max_images=max_images))
            with queue.extra_slots(len(images) - 1):
                return await _while_connected(request, asyncio.gather(*map(queue.answer, images)))

    app = FastAPIOffline(  # /docs loads nothing from other servers
        title="FoodExtract Vision", version=__version__, summary="Images in, strict JSON out.", lifespan=lifespan
    )
    app.state.queue = queue
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=("Retry-After", "X-Request-Id"),
    )
    app.add_middleware(RequestLog, metrics=metrics)
    guarded = [Depends(check_key)] if settings.api_key else []

    @app.exception_handler(RequestError)
    async def send_error(request: Request, error: RequestError) -> JSONResponse:
        request.scope["reason"] = error.problem.reason  # for the log
        metrics.rejects.labels(error.problem.reason).inc()
        return JSONResponse(error.problem.model_dump(), error.problem.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, _: ClientDisconnect) -> JSONResponse:
        """Status 499 appears in logs and metrics only."""
        return await send_error(request, RequestError(499, "client_gone", "the client disconnected"))

    @app.post("/predict", dependencies=guarded, **ONE)
    async def predict(request: Request) -> Single:
        """Answer one image: the form field `image`, the body itself, or base64 in the field `image` of a JSON object.

        `curl -F image=@lunch.jpg http://localhost:8000/predict`, or
        `curl --data-binary @lunch.jpg http://localhost:8000/predict`. An animation counts as its first frame.
        """
        [result] = await predictions(request, "image", 1)
        if isinstance(result, RequestError):
            raise result
        return Single(model=model, **result.model_dump())

    @app.post("/predict/batch", dependencies=guarded, **MANY)
    async def predict_batch(request: Request) -> Batch:
        """Answer several images, each in a form field `images`. A bad image gets an error; the others are answered.

        `curl -F images=@a.jpg -F images=@b.jpg http://localhost:8000/predict/batch`
        """
        results = await predictions(request, "images", min(settings.upload.max_images, settings.queue.size))
        for error in results:
            if isinstance(error, RequestError):
                metrics.rejects.labels(error.problem.reason).inc()
        return Batch(model=model, results=[r.problem if isinstance(r, RequestError) else r for r in results])

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "The model fails or hangs."}}, **PROBE)
    async def health() -> PlainTextResponse:
        """Liveness: 503 when only a new process can help."""
        return PlainTextResponse("ok") if queue.healthy else PlainTextResponse("the model fails or hangs", 503)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"description": "The reason in a word."}}, **PROBE)
    async def ready() -> PlainTextResponse:
        """Readiness: 200 while images are accepted."""
        return PlainTextResponse(queue.unavailable or "ready", 503 if queue.unavailable else 200)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", **PROBE)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _while_connected(
    request: Request, work: asyncio.Future[list[Prediction | RequestError]]
) -> list[Prediction | RequestError]:
    """Return the result of `work`. If the client disconnects first, cancel it and raise ClientDisconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(disconnected())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

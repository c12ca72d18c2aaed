"""Prometheus metrics and JSON log lines of a server. They never hold image contents, file names or keys."""

import logging
import time
import uuid
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("foodextract")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # bucket bounds
FORMATTER = JsonFormatter(
    ["levelname", "message"],
    timestamp="time",
    rename_fields={"levelname": "level", "message": "event", "exc_info": "exception"},
    reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's copy of its message, with terminal colors
)


class ServerMetrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.queue_depth = gauge("foodextract_queue_depth", "Accepted images not yet at the model.")
        self.in_flight = gauge("foodextract_in_flight", "Images at the model.")
        self.batch_size = histogram("foodextract_batch_size", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.phases = histogram("foodextract_phase_seconds", "Seconds by phase.", ["phase"], buckets=SECONDS)
        self.requests = counter("foodextract_requests", "Requests by path and status.", ["path", "status"])
        self.rejects = counter("foodextract_rejects", "Images and requests not answered, by reason.", ["reason"])


def log_json_lines() -> None:
    """Send the logs of this package and of uvicorn to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTER)
    for name in ("foodextract", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class RequestLog:
    """ASGI middleware that gives every request an id, counts it and logs one line about it."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, status, start = uuid.uuid4().hex, 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            path = getattr(scope.get("route"), "path", "unknown")  # the route's template, never the client's text
            self.metrics.requests.labels(path, str(status)).inc()
            facts = {"request": request_id, "method": scope["method"], "path": path, "status": status}
            facts["seconds"] = round(time.perf_counter() - start, 4)
            LOG.info("request", extra=facts | ({"reason": scope["reason"]} if "reason" in scope else {}))

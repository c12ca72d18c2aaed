"""What a server tells those who run it: Prometheus metrics and JSON log lines. Never what is in an image, what it is called, or a key."""

import json
import logging
import time
import uuid
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("foodextract")
SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
)  # from the tiny model on a CPU to a deadline missed


class Meters:
    """The metrics of one server, in a registry of their own, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.queue_depth = Gauge(
            "foodextract_queue_depth", "Images accepted that the model has not begun with.", registry=registry
        )
        self.in_flight = Gauge("foodextract_in_flight", "Images before the model now.", registry=registry)
        self.batch_size = Histogram(
            "foodextract_batch_size", "Images a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.phases = Histogram(
            "foodextract_phase_seconds", "Seconds by phase, of images.", ["phase"], buckets=SECONDS, registry=registry
        )
        self.requests = Counter(
            "foodextract_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.rejects = Counter(
            "foodextract_rejects", "Images and requests not answered, by reason.", ["reason"], registry=registry
        )


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the facts passed as `extra={"facts": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        line |= {"event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_json_lines() -> None:
    """Send what this package and uvicorn log to stderr, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("foodextract", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class Journal:
    """Gives every request a number, counts it, and writes one line about it."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, status, started = uuid.uuid4().hex, 500, time.perf_counter()

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        finally:
            seconds = time.perf_counter() - started
            path = getattr(scope.get("route"), "path", "unknown")  # of the route: a client's own words are not logged
            self.meters.requests.labels(path, str(status)).inc()
            facts = {
                "request": number,
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(seconds, 4),
            }
            facts |= {"reason": scope["reason"]} if "reason" in scope else {}
            LOG.info("request", extra={"facts": facts})

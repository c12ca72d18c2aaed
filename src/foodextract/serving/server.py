"""The server process: address, signals, idle connections."""

import asyncio
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol  # uvicorn has no timeout for request heads

from foodextract.inference.blip import Answerer
from foodextract.serving.app import Settings, create_app
from foodextract.serving.queue import Queue
from foodextract.serving.telemetry import log_json_lines

MAX_CONNECTIONS = 4096  # beyond it uvicorn answers 503, to probes too: far above the number that gets 429 at once
WRITE_TIMEOUT = 5  # seconds at shutdown to send answers that are already made
HEAD_TIMEOUT = 10.0  # seconds for the head of a request


class _HeadTimeoutProtocol(H11Protocol):
    """Closes a connection that sends no complete request head within HEAD_TIMEOUT."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_TIMEOUT, self._check, None)

    def _check(self, last_cycle: object) -> None:
        """Close unless a request is in progress or a new one began since the last check."""
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if not idle or self.cycle is not last_cycle:
            self.loop.call_later(HEAD_TIMEOUT, self._check, self.cycle)
            return
        if self.conn.trailing_data[0]:  # half a head
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.transport.close()


class Server(uvicorn.Server):
    """Drains at the first signal: answers accepted requests, rejects new ones. A second signal stops at once."""

    def __init__(self, config: uvicorn.Config, queue: Queue) -> None:
        super().__init__(config)
        self.queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.queue.draining:
            super().handle_exit(sig, frame)
        self.queue.draining = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self.queue.error is not None or (self.queue.draining and not self.queue.accepted)
        return await super().on_tick(counter)


def make_server(load: Callable[[], Answerer], model: str, settings: Settings, host: str, port: int) -> Server:
    """Build a server that is not running yet. Port 0 takes a free port, which its first log line names."""
    app = create_app(load, model, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        root_path=settings.root_path,
        http=_HeadTimeoutProtocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=WRITE_TIMEOUT,
    )
    return Server(config, app.state.queue)


def run(load: Callable[[], Answerer], model: str, settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then finish accepted requests. Raises what `load` raised."""
    log_json_lines()
    server = make_server(load, model, settings, host, port)
    server.run()
    if server.queue.error:
        raise server.queue.error

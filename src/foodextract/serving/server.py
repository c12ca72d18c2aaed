"""The process around the HTTP door: address, signals, connections that come to nothing."""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from foodextract.inference.blip import Answerer
from foodextract.serving.app import Settings, create_app
from foodextract.serving.queue import Batcher
from foodextract.serving.telemetry import log_json_lines

MAX_CONNECTIONS = (
    4096  # uvicorn answers 503 beyond, probes as well: far more than callers who are told 429 at the same time
)
WRITING_SECONDS = 5  # for the last answers; they are made before
IDLE_SECONDS = 10.0  # within which a connection must send the whole head of a request


class _Patient(H11Protocol):
    """Closes a connection that sends no whole head of a request for too long, which uvicorn would wait for without end."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(IDLE_SECONDS, self._look, None)

    def _look(self, seen: object) -> None:
        """Between two looks a request must have begun, or one be under way."""
        if self.transport.is_closing():
            return
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self.cycle is seen:
            if self.conn.trailing_data[0]:  # half a head: they are told; who says nothing at all is not
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
        else:
            self.loop.call_later(IDLE_SECONDS, self._look, self.cycle)


class Server(uvicorn.Server):
    """Drains at the first signal: what was accepted is answered, what comes is told to go elsewhere. A second signal stops at once."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self.batcher = batcher

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.batcher.draining:
            super().handle_exit(sig, frame)
        self.batcher.draining = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self.batcher.error is not None or (self.batcher.draining and not self.batcher.guests)
        return await super().on_tick(counter)


def make_server(load: Callable[[], Answerer], model: str, settings: Settings, host: str, port: int) -> Server:
    """A server that has not begun; port 0 is any free one, which its first log line names."""
    app = create_app(load, model, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Patient,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=WRITING_SECONDS,
    )
    return Server(config, app.state.batcher)


def run(load: Callable[[], Answerer], model: str, settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, and then until all that was accepted is answered. Raises what `load` raised."""
    log_json_lines()
    server = make_server(load, model, settings, host, port)
    server.run()
    if server.batcher.error:
        raise server.batcher.error

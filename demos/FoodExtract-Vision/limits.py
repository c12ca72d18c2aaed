"""What the page takes from strangers: so many bytes, counted before anybody decodes them, and no address that it would have to fetch."""

import asking
from gradio import processing_utils
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOAD = asking.MAX_IMAGES * asking.MAX_BYTES + 2**20  # files on their way to the disk; each is weighed there
MAX_TEXT = asking.MAX_BYTES * 4 // 3 + 2**20  # JSON, in which MCP sends an image as base64


class Limited:
    """Tell a sender whose body is too large so (413), by what it announces or else by what has come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = MAX_UPLOAD if scope["path"].endswith("/upload") else MAX_TEXT
        message = f"More than {most / 2**20:.0f} MB at once are too much: send fewer or smaller images."
        if int(Headers(scope=scope).get("content-length", 0)) > most:
            await PlainTextResponse(message, 413)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > most:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


async def fetch_nothing(url: str, cache_dir: str) -> str:
    """In the place of Gradio's download, which takes whatever there is, however large, while the model waits."""
    raise asking.complaint(
        f"nothing is fetched from {url[:100]}: send the image itself, as a file, or over MCP as a data URL"
    )


processing_utils.async_ssrf_protected_download = fetch_nothing

"""Limits on what the page accepts: bytes, counted before anything is decoded, and no URLs but those of its uploads."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import predict
from gradio import processing_utils
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOAD = predict.MAX_IMAGES * predict.MAX_BYTES + 2**20  # bytes of files, which go to disk and are checked there
MAX_TEXT = predict.MAX_BYTES * 4 // 3 + 2**20  # bytes of JSON, in which MCP sends an image as base64


class BodyLimit:
    """ASGI middleware that answers 413 to a body that is too large, by its declared or its actual length."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = MAX_UPLOAD if scope["path"].endswith("/upload") else MAX_TEXT
        message = f"The body exceeds {limit / 2**20:.0f} MB: send fewer or smaller images."
        if int(Headers(scope=scope).get("content-length", 0)) > limit:
            await PlainTextResponse(message, 413)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > limit:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


def upload_at(path: str) -> Path | None:
    """Return the file of an upload by the path of its URL, None if there is none."""
    file = Path(path.partition("/gradio_api/file=")[2]).resolve()
    return file if file.is_relative_to(Path(get_upload_folder()).resolve()) and file.is_file() else None


async def resolve_url(url: str, cache_dir: str) -> str:
    """Replace Gradio's download of URLs, which has no size limit: the address of an upload becomes its path.

    No address is ever contacted. Any other is an error.
    """
    if file := upload_at(unquote(urlsplit(url).path)):
        return str(file)
    remedy = "upload the image to this server first, or send it as a file or as a data URL"
    raise predict.user_error(f"the address {url[:100]} is not fetched: {remedy}")


# Private, because Gradio has no setting for it, and a subclass of each component would write .pyi files beside app.py.
processing_utils.async_ssrf_protected_download = resolve_url

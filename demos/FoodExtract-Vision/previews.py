"""Previews of the images that browsers do not show, above all HEIC from phones."""

import re
from functools import lru_cache
from pathlib import Path
from threading import Lock

import limits
import predict
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from foodextract.images import HEIF_START

SUFFIXES = ("heic", "heif", "hif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
START = re.compile(HEIF_START + rb"|II\*\0|MM\0\*|P[1-7]\s", re.DOTALL)  # the first bytes of HEIF, TIFF and PNM
SIDE = 1024  # pixels of a preview
DECODING = Lock()

# Gradio's image input ignores a file without a type, and browsers give none to HEIC where the system does not know it.
TYPES = f"""<script>
const {{get}} = Object.getOwnPropertyDescriptor(Blob.prototype, "type");
Object.defineProperty(File.prototype, "type", {{get() {{
    const [, suffix] = this.name.toLowerCase().match(/[.]({"|".join(SUFFIXES)})$/) || [];
    return get.call(this) || (suffix ? `image/${{suffix}}` : "");
}}}});
</script>"""


class Previews:
    """ASGI middleware that answers an `<img>` with a JPEG of an upload that browsers do not show.

    Downloads, which do not ask for images alone, get the file as it is.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and Headers(scope=scope).get("accept", "").startswith("image/"):
            file = limits.upload_at(scope["path"])
            if file and (preview := await run_in_threadpool(jpeg, file)):
                await Response(preview, media_type="image/jpeg", headers={"Vary": "Accept"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


@lru_cache(64)
def jpeg(file: Path) -> bytes:
    """Return a preview, b"" if browsers show the file or it cannot be read. Decodes one image at a time."""
    with file.open("rb") as opened:
        if not START.match(opened.read(16)):
            return b""
    with DECODING:
        return predict.small_jpeg(str(file), SIDE)

"""Read the images of a request body, within limits on bytes, files and seconds."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser

from foodextract.serving.errors import RequestError

MEGABYTE = 1_000_000
MAX_FIELDS = 16  # text fields of a form, which are ignored
MAX_HEAD = 16_384  # bytes of header names and values
# The first bytes of bodies that are texts, and what to do instead.
TEXTS = {
    b"{": "JSON: add the header Content-Type: application/json",
    b"image=": "form data without a file: send the file, as with `curl -F image=@lunch.jpg`",
    b"images=": "form data without files: send the files, as with `curl -F images=@lunch.jpg`",
    b"data:": 'a data URL: send {"image": "data:…"} with the header Content-Type: application/json',
    b"/9j/": 'base64: send {"image": "/9j/…"} with the header Content-Type: application/json',
    b"iVBORw0KGgo": 'base64: send {"image": "iVBORw0KGgo…"} with the header Content-Type: application/json',
}


@dataclass(frozen=True)
class UploadLimits:
    """Limits on one request body."""

    max_bytes: int = 10 * MEGABYTE
    max_images: int = 16  # in one batch form
    timeout: float = 10.0  # seconds for the whole body


async def read_images(request: Request, field: str, limits: UploadLimits) -> list[bytes]:
    """Return the images of a form, of a JSON object with base64, or the whole body of any other type.

    `field` is the name of the form field, or of the key with a text or a list of texts. Nothing is written to disk.
    Raises RequestError (400, 408, 413, 431), or ClientDisconnect.
    """
    if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEAD:
        raise RequestError(431, "head_too_large", f"the headers exceed {MAX_HEAD:,} bytes: send fewer or shorter ones")
    try:
        async with asyncio.timeout(limits.timeout):
            kind = request.headers.get("content-type", "").lower().partition(";")[0].strip()
            if kind == "multipart/form-data":
                return await _read_form(request, field, limits)
            body = b"".join([chunk async for chunk in _limited(request, limits)])
    except TimeoutError:
        message = f"the body took more than {limits.timeout:g} s: send it faster, or send a smaller image"
        raise RequestError(408, "slow_upload", message, {"Connection": "close"}) from None
    if not body:
        raise RequestError(400, "no_image", f"the body is empty: send an image as the body or in the field {field!r}")
    if kind == "application/json":
        return await asyncio.to_thread(_read_json, body, field, limits)
    for start, remedy in TEXTS.items():
        if body[:100].lstrip().startswith(start):
            raise RequestError(415, "not_an_image", f"not an image but {remedy}")
    return [body]


def _read_json(body: bytes, field: str, limits: UploadLimits) -> list[bytes]:
    example = '["…", "…"]' if field == "images" else '"…"'
    remedy = f'send {{"{field}": {example}}}, each image in base64 or as a data URL'
    try:
        found = json.loads(body)[field]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        message = f"the body is no JSON object with the key {field!r} ({type(error).__name__}): {remedy}"
        raise RequestError(400, "bad_json", message) from None
    texts = found if field == "images" else [found]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "bad_json", f"the value of {field!r} has another type: {remedy}")
    if not texts:
        raise RequestError(400, "no_image", f"{field!r} is empty: {remedy}")
    if len(texts) > limits.max_images:
        raise RequestError(413, "too_many_images", f"{field!r} has more than {limits.max_images} images: send fewer")
    try:
        return [base64.b64decode(_without_head(text), validate=True) for text in texts]
    except ValueError:
        message = f"{field!r} is not base64 (addresses are not fetched): {remedy}"
        raise RequestError(400, "bad_base64", message) from None


def _without_head(text: str) -> str:
    """Base64 without the head of a data URL, spaces and line ends."""
    return "".join((text.partition(",")[2] if text.startswith("data:") else text).split())


async def _limited(request: Request, limits: UploadLimits) -> AsyncGenerator[bytes, None]:
    error = RequestError(
        413, "body_too_large", f"the body exceeds {limits.max_bytes / MEGABYTE:g} MB: send a smaller image, or fewer"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limits.max_bytes:
        raise error
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limits.max_bytes:
            raise error
        yield chunk


async def _read_form(request: Request, field: str, limits: UploadLimits) -> list[bytes]:
    body = _limited(request, limits)
    parser = MultiPartParser(request.headers, body, max_files=limits.max_images, max_fields=MAX_FIELDS)
    parser.spool_max_size = limits.max_bytes  # keep files in memory: `request.form()` would spool them to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            message = f"the form has more than {limits.max_images} images: send fewer at once"
            raise RequestError(413, "too_many_images", message) from None
        message = f"the form cannot be read ({error.message}): send multipart/form-data"
        raise RequestError(400, "bad_form", message) from None
    images = [await part.read() for part in form.getlist(field) if not isinstance(part, str)]
    await form.close()
    if not images:
        raise RequestError(400, "no_image", f"the form has no file in the field {field!r}: send an image there")
    return images

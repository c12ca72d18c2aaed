"""A request's body → the bytes of its images, within limits; everything else is a refusal with a status and a reason."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser

MEGABYTE = 1_000_000
MAX_FIELDS = 16  # of text, which nobody reads
MAX_HEAD = 16_384  # bytes of names and values in a request's head


@dataclass(frozen=True)
class Upload:
    """What is read from a client before it is turned away."""

    max_bytes: int = 10 * MEGABYTE  # a whole body
    max_images: int = 16  # in one batch form
    seconds: float = 10.0  # for a whole body: whoever is slower is told so, and holds no place


class Refusal(Exception):
    """A request that is not answered as asked: the HTTP status, a reason for programs, a message for people."""

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.headers = status, reason, message, headers


async def read_images(request: Request, field: str, upload: Upload) -> list[bytes]:
    """The images in the form field `field`, or the whole body where it is no form: what they are, their bytes will tell.

    Nothing is written to disk. Raises Refusal (400, 408, 413, 431), or ClientDisconnect.
    """
    if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEAD:
        raise Refusal(
            431, "head_too_large", f"the head of a request may have {MAX_HEAD:,} bytes: send fewer or shorter headers"
        )
    try:
        async with asyncio.timeout(upload.seconds):
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                return await _read_form(request, field, upload)
            body = b"".join([chunk async for chunk in _limited(request, upload)])
    except TimeoutError:
        message = f"the body was not here after {upload.seconds:g} s: send it faster, or a smaller image"
        raise Refusal(408, "slow_upload", message, {"Connection": "close"}) from None
    if not body:
        raise Refusal(400, "no_image", f"the body is empty: send an image as the body, or as the form field {field!r}")
    return [body]


async def _limited(request: Request, upload: Upload) -> AsyncIterator[bytes]:
    message = f"a body may have {upload.max_bytes / MEGABYTE:g} MB: send a smaller image, or fewer"
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > upload.max_bytes:
        raise Refusal(413, "body_too_large", message)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > upload.max_bytes:
            raise Refusal(413, "body_too_large", message)
        yield chunk


async def _read_form(request: Request, field: str, upload: Upload) -> list[bytes]:
    parser = MultiPartParser(
        request.headers, _limited(request, upload), max_files=upload.max_images, max_fields=MAX_FIELDS
    )
    parser.spool_max_size = upload.max_bytes  # in memory, which is bounded, and never on disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            few = f"a form may have {upload.max_images} images here: send fewer at once"
            raise Refusal(413, "too_many_images", few) from None
        raise Refusal(400, "bad_form", f"the form cannot be read ({error.message}): send multipart/form-data") from None
    images = [await part.read() for part in form.getlist(field) if not isinstance(part, str)]
    await form.close()
    if not images:
        raise Refusal(400, "no_image", f"the form has no file in the field {field!r}: send an image there")
    return images

"""Requests that nobody honest sends: images cut short, or said to be enormous, other files, broken HTTP, callers in no
hurry.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

WRONG = (
    b"",
    b"<html>pizza</html>",
    b"%PDF-1.7\n",
    b"PK\x03\x04" + b"\0" * 100,
    b"MZ" + b"\0" * 500,
    b'{"url": "http://a/"}',
    b"<svg/>",
)
BAD_HEADERS = (
    b"Content-Length: -1\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n",
    b"X: " + b"y" * 70_000 + b"\r\n",
    b": x\r\n",
    b"\xff\r\n",
)
BOUNDARY = b"b0undary"


def post(body: bytes, kind: bytes = b"application/octet-stream", more: bytes = b"") -> bytes:
    """A whole request to /predict."""
    length = b"" if b"ength" in more or b"chunked" in more else b"Content-Length: %d\r\n" % len(body)
    return (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: " + kind + b"\r\n" + length + more + b"\r\n" + body
    )


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _huge_png(side: int) -> bytes:
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + data


def _huge_gif(side: int) -> bytes:
    data = bytearray(_encoded(Image.new("P", (1, 1)), "GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    place = data.index(b",", 13)
    data[place + 5 : place + 9] = struct.pack("<HH", side, side)
    return bytes(data)


def _huge_bmp(side: int) -> bytes:
    data = bytearray(_encoded(Image.new("RGB", (1, 1)), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def _text_bomb() -> bytes:
    """A small PNG whose compressed comment is 200 MB."""
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 200_000_000, 1))
    return _encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)


def _form(name: bytes, body: bytes) -> bytes:
    head = (
        b"--"
        + BOUNDARY
        + b'\r\nContent-Disposition: form-data; name="'
        + name
        + b'"; filename="../../lunch.jpg"\r\n\r\n'
    )
    return head + body + b"\r\n--" + BOUNDARY + b"--\r\n"


def hostile(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """The first `count` of an endless series: the kind, and the bytes of a request to send.

    Kinds with `slow` are to be trickled.
    """
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8))
    whole = [_encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")]
    form, bomb = b"multipart/form-data; boundary=" + BOUNDARY, _text_bomb()
    for number in range(count):
        garbage = rng.bytes(int(rng.integers(1, 3000)))
        image = whole[int(rng.integers(len(whole)))]
        cut = image[: int(rng.integers(1, len(image) * 3 // 4))]
        wrong = WRONG[int(rng.integers(len(WRONG)))]
        side = int(rng.integers(9_000, 30_000))
        match number % 16:
            case 0 | 1:
                yield "truncated", post(cut)
            case 2:
                yield "truncated in a form", post(_form(b"image", cut), form)
            case 3:
                yield "wrong type", post(wrong, b"image/jpeg")
            case 4:
                yield "wrong type in a form", post(_form(b"image", wrong), form)
            case 5:
                yield "noise", post(garbage)
            case 6:
                yield "huge PNG", post(_huge_png(side))
            case 7:
                yield "huge GIF or BMP", post(_huge_gif(side) if number % 32 < 16 else _huge_bmp(side))
            case 8:
                yield "text bomb", post(bomb)
            case 9:
                yield "form cut short", post(_form(b"image", image)[: int(rng.integers(1, 200))], form)
            case 10:
                yield "form of noise", post(garbage, form)
            case 11:
                yield "declared too large", post(b"x", more=b"Content-Length: 99999999999\r\n")
            case 12:
                chunks = (b"100000\r\n" + b"x" * 2**20 + b"\r\n") * 11
                yield "too large in chunks", post(chunks, more=b"Transfer-Encoding: chunked\r\n")
            case 13:
                yield "broken head", post(image, more=BAD_HEADERS[number // 16 % len(BAD_HEADERS)])
            case 14:
                yield "no HTTP", garbage + b"\r\n\r\n"
            case _:
                slow = post(json.dumps({"n": number}).encode() * 50)
                yield ("slow body", slow) if number % 32 < 16 else ("slow head", slow)

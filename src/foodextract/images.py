"""Opening images from strangers: any common file becomes an upright RGB image or an error that says what to do."""

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that runs a program, as EPS would
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"})
MAX_PIXELS = (
    64_000_000  # checked before decoding: Pillow holds 4 bytes a pixel, so each copy of 64 megapixels is 256 MB
)
SCALED = [(value + 128) // 257 for value in range(65536)]  # 16 bits as 8, rounded

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter rule


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names the reason and the remedy."""


class FormatError(ImageError):
    """A file that is not an image at all, or in a format that is not read."""


def open_image(source: ImageSource) -> Image.Image:
    """Read a path, the bytes of a file, a PIL image or an array as upright 8-bit RGB.

    An array is (height, width), or (height, width, 3 or 4) for RGB or RGBA, of uint8.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float images are scaled to 8 bits, of an animation the
    first frame counts. Raises ImageError.
    """
    if isinstance(source, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or source.shape[2:] not in ((), (3,), (4,))
            or not source.size
        ):
            shape = " x ".join(map(str, source.shape))
            raise ImageError(
                f"an array of {shape} {source.dtype} is not an image: make it height x width, or x 3 or x 4, of uint8"
            )
        return _as_rgb(Image.fromarray(source))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError("no such file: check the path") from None
    except OSError as error:
        raise ImageError(f"cannot be opened ({error.strerror}): check the path and its permissions") from error
    if not data:
        raise ImageError("the file is empty (0 bytes): copy or download it again")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                megapixels = image.width * image.height / 1e6
                raise ImageError(
                    f"{megapixels:.0f} megapixels are more than the {MAX_PIXELS / 1e6:.0f} we decode: shrink it first"
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise FormatError(f"not an image in a format we read: save it as one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"far more than the {MAX_PIXELS / 1e6:.0f} megapixels we decode: shrink it first") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise ImageError(f"damaged or truncated ({error}): copy or download it again") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """A copy, made without more than two others on the way: what is opened may fill a server's memory."""
    if image.mode == "F":
        top = max(1.0, image.getextrema()[1])
        image = image.point(lambda value: value * (255 / top) + 0.5).convert("L")
    elif image.mode.startswith("I"):
        image = image.convert("I").point(SCALED, "L")
    elif image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def find_images(paths: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """The files among `paths` as they are (whatever they turn out to be), and all images below its folders, sorted."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            yield path

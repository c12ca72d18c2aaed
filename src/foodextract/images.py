"""Opening untrusted images: a common file becomes an upright RGB image, or an error that names the remedy."""

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that runs a program, as EPS would
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"})
MAX_PIXELS = 64_000_000  # checked before decoding; each decoded copy takes 4 bytes a pixel, so 256 MB
TO_8_BITS = [(value + 128) // 257 for value in range(65536)]  # 16 bits to 8, rounded

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter rule


class ImageError(ValueError):
    """An image that cannot be read. The message names the reason and the remedy."""


class FormatError(ImageError):
    """A file that is no image, or an image in an unsupported format."""


def open_image(source: ImageSource) -> Image.Image:
    """Read a path, encoded bytes, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4) as upright 8-bit RGB.

    Applies EXIF orientation, lays transparency on white, scales 16-bit and float images to 8 bits, and takes the
    first frame of an animation. Raises ImageError.
    """
    if isinstance(source, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        shape = source.shape
        if source.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (3,), (4,)) or not source.size:
            size = " x ".join(map(str, shape))
            raise ImageError(
                f"an array of {size} {source.dtype} is not an image: make it height x width, or x 3 or x 4, of uint8"
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
    return _decoded(data)


def _decoded(data: bytes) -> Image.Image:
    limit = f"the {MAX_PIXELS / 1e6:.0f} we decode: shrink it first"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width * image.height / 1e6:.0f} megapixels are more than {limit}")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise FormatError(f"not an image in a format we read: save it as one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"far more megapixels than {limit}") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise ImageError(f"damaged or truncated ({error}): copy or download it again") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """Copy as RGB with at most two further copies in memory at once."""
    if image.mode == "F":
        scale = 255 / max(1.0, cast(tuple[float, float], image.getextrema())[1])
        image = image.point(lambda value: value * scale + 0.5).convert("L")
    elif image.mode.startswith("I"):
        image = image.convert("I").point(TO_8_BITS, "L")
    elif image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def find_images(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Yield the files among `paths` as they are, and all images below the folders among them, sorted."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            yield path

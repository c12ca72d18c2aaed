"""Opening untrusted images: a common file becomes an upright RGB image, or an error that names the remedy."""

import io
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that runs a program, as EPS would
HEIF = "HEIF"  # HEIC is one; read only where the extra `heic` is installed
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"}
    | {".heic", ".heif", ".hif", ".ppm", ".pgm", ".pbm", ".pnm"}
)
UNCERTAIN = ("", ".img")  # of files that are images if they begin like one
NOTES = frozenset({".arrow", ".csv", ".db", ".ini", ".json", ".jsonl", ".md", ".parquet", ".txt", ".xml", ".yaml"})
NOT_SEARCHED = ("__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN")  # and hidden folders
HEIF_START = rb".{4}ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)"
IMAGE_START = rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftypavi[fs]|" + HEIF_START
PNG_START = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
JPEG_METADATA = {0xE0, *range(0xE2, 0xEE), 0xEF, 0xFE}  # all application segments but Exif and Adobe, and comments
PNG_METADATA = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
MAX_PIXELS = 64_000_000  # checked before decoding; each decoded copy takes 4 bytes a pixel, so 256 MB
TO_8_BITS = [(value + 128) // 257 for value in range(65536)]  # 16 bits to 8, rounded

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any]

LOG = logging.getLogger("foodextract")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is the stricter rule


class ImageError(ValueError):
    """An image that cannot be read. The message names the reason and the remedy."""


class FormatError(ImageError):
    """A file that is no image, or an image in an unsupported format."""


def open_image(source: ImageSource) -> Image.Image:
    """Read a path, encoded bytes, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4) as upright 8-bit RGB.

    Applies EXIF orientation, lays transparency on white, scales 16-bit and float images to 8 bits, and takes the
    first frame of an animation. Metadata that cannot be read is ignored. Raises ImageError.
    """
    if isinstance(source, Image.Image):
        if not 0 < source.width * source.height <= MAX_PIXELS:
            size, most = f"{source.width} x {source.height} pixels", f"{MAX_PIXELS / 1e6:.0f} megapixels"
            raise ImageError(f"{size}: give an image that is not empty, and has at most {most}")
        try:
            image = source.copy()  # decodes a file that was opened lazily
        except Exception as error:  # as many types as there are formats
            raise ImageError(f"damaged or truncated ({error}): copy or download it again") from error
        _turn_upright(image)
        return _as_rgb(image)
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
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot be opened ({reason}): check the path and its permissions") from error
    return decode(data)[0]


def decode(data: bytes) -> tuple[Image.Image, bool]:
    """Return what `open_image` does, and whether any Pillow reads the file: not if HEIF or with broken metadata.

    Raises ImageError.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes): copy or download it again")
    try:
        return _decoded(data)
    except ImageError:
        whole = _without_metadata(data)
        if whole == data:
            raise
    return _decoded(whole)[0], False


def _decoded(data: bytes) -> tuple[Image.Image, bool]:
    limit = f"the {MAX_PIXELS / 1e6:.0f} we decode: shrink it first"
    heif = _is_heif(data)
    try:
        with Image.open(io.BytesIO(data), formats=(*FORMATS, HEIF) if heif else FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width * image.height / 1e6:.0f} megapixels are more than {limit}")
            image.load()
            whole = _turn_upright(image)
            return _as_rgb(image), whole and image.format != HEIF
    except ImageError:
        raise
    except UnidentifiedImageError:
        if heif:
            raise ImageError("damaged or truncated HEIC: copy or download it again") from None
        raise FormatError(f"not an image in a format we read: save it as one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"far more megapixels than {limit}") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise ImageError(f"damaged or truncated ({error}): copy or download it again") from error


def _is_heif(data: bytes) -> bool:
    """Tell whether to read a file as HEIF, and prepare Pillow for it. Raises FormatError without the extra."""
    if not re.match(HEIF_START, data, re.DOTALL):
        return False
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        if data[8:12] in (b"mif1", b"msf1"):  # may be AVIF
            return False
        message = "a HEIC image: pip install 'foodextract[heic]' to read it, or save it as JPEG"
        raise FormatError(message) from None
    register_heif_opener()
    return True


def _turn_upright(image: Image.Image) -> bool:
    """Apply the EXIF orientation of a loaded image in place. Returns whether the metadata could be read."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # of metadata only: it comes before turning the image, or after it, when Exif is written back
        return False
    return True


def _without_metadata(data: bytes) -> bytes:
    """Drop what Pillow refuses where it is damaged, or in a PNG over 1 MB: texts, profiles, sizes in print.

    Exif and pixels stay, and the Adobe segment of a JPEG, which says how colors are stored.
    """
    if data.startswith(PNG_START):
        kept, at = [PNG_START], len(PNG_START)
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kept += [data[at:end]] * (data[at + 4 : at + 8] not in PNG_METADATA)
            at = end
        return b"".join(kept)
    if data.startswith(JPEG_START):
        kept, at = [JPEG_START], len(JPEG_START)
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xff", b"\xda"):  # pixels follow
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            kept += [data[at:end]] * (data[at + 1] not in JPEG_METADATA)
            at = end
        return b"".join([*kept, data[at:]])
    return data


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
    """Yield the files among `paths` as they are, and all images below the folders among them, sorted.

    An image has one of `SUFFIXES`, or none and the first bytes of one. Links to folders are followed; each folder is
    read once. Hidden folders, `NOT_SEARCHED` and the files `._*` of macOS are left out. Other files are named in a
    warning, except `NOTES`.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        images, others = images_and_others(path)
        if passed := [file for file in others if file.suffix.lower() not in NOTES and file.name[0] != "."]:
            names = ", ".join(file.relative_to(path).as_posix() for file in passed[:3]) + ", …" * (len(passed) > 3)
            count = f"{len(passed)} file{'s' * (len(passed) > 1)}"
            LOG.warning(f"passed over {count} in {path}, in no format we read: {names}")
        yield from images


def images_and_others(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the images below a folder and the other files, each sorted; see `find_images`. Broken links are kept."""
    found: tuple[list[Path], list[Path]] = [], []
    for file in sorted(_files(root)):
        found[not _is_image(file)].append(file)
    return found


def _files(root: Path) -> Iterator[Path]:
    seen = set()

    def unreadable(error: OSError) -> None:
        LOG.warning(f"passed over the folder {error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        searched = [] if real in seen else [name for name in folders if name[0] != "." and name not in NOT_SEARCHED]
        folders[:] = sorted(searched, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        if real not in seen:
            paths = (Path(folder, name) for name in files if name[:2] != "._")
            yield from (path for path in paths if path.is_file() or not path.exists())
        seen.add(real)


def _is_image(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix not in UNCERTAIN:
        return suffix in SUFFIXES
    with suppress(OSError), file.open("rb") as opened:
        return re.match(IMAGE_START, opened.read(16), re.DOTALL) is not None
    return False

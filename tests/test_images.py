import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from foodextract import images
from foodextract.images import MAX_PIXELS, FormatError, ImageError, decode, find_images, open_image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = Image.new("RGB", (40, 30), (200, 20, 20))
ODD_BUT_FINE = {
    "1 x 1": encoded(Image.new("RGB", (1, 1))),
    "1 x 3000": encoded(Image.new("RGB", (1, 3000))),
    "16 bits": encoded(Image.fromarray(np.full((30, 40), 40000, np.uint16))),
    "palette": encoded(RED.quantize(4)),
    "palette with transparency": encoded(RED.quantize(4), transparency=0),
    "transparent": encoded(Image.new("RGBA", (40, 30), (0, 0, 0, 0))),
    "black and white": encoded(RED.convert("1")),
    "CMYK": encoded(RED.convert("CMYK"), "JPEG"),
    "animated": encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")]),
    "32-bit float": encoded(Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)), "TIFF"),
}


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_odd_images_become_rgb(name):
    image = open_image(ODD_BUT_FINE[name])
    assert image.mode == "RGB"
    assert min(image.size) >= 1


def test_16_bits_are_scaled_and_not_clipped():
    assert open_image(ODD_BUT_FINE["16 bits"]).getpixel((0, 0)) == (156, 156, 156)  # 40000 / 257


def test_16_bit_values_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for whole in (values, values.astype(np.int32)):
        assert np.array_equal(np.asarray(open_image(Image.fromarray(whole)))[..., 0], np.round(values / 257))


def test_floats_are_scaled_by_their_maximum_and_clipped_at_0():
    values = np.array([[-3, 0, 100, 200]], np.float32)
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 128, 255]


LIMITED = """
import resource, sys
from foodextract.images import open_image
data = sys.stdin.buffer.read()
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 14 * 4000**2,) * 2)
print(open_image(data).mode)
"""


@pytest.mark.parametrize("mode", ["I;16", "F", "RGBA", "P", "RGB"])
def test_opening_takes_at_most_14_bytes_per_pixel(mode):
    options = {"transparency": 0} if mode == "P" else {"compression": "tiff_deflate"} if mode == "F" else {}
    data = encoded(Image.new(mode, (4000, 4000)), "TIFF" if mode == "F" else "PNG", **options)
    ended = subprocess.run([sys.executable, "-c", LIMITED], input=data, capture_output=True)
    assert ended.stdout == b"RGB\n", ended.stderr.decode()


def test_transparency_is_laid_on_white():
    assert open_image(ODD_BUT_FINE["transparent"]).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame():
    assert open_image(ODD_BUT_FINE["animated"]).getpixel((0, 0))[0] > 150


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(RED, "JPEG", exif=exif)).size == (30, 40)


def with_exif(*entries):
    """RED as a JPEG whose Exif has these entries: tag, type, count, value."""
    packed = b"".join(struct.pack("<HHI", tag, kind, 1) + value.ljust(4, b"\0") for tag, kind, value in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    jpeg = encoded(RED, "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def with_chunk(kind, data):
    """RED as a PNG with one more chunk before its pixels."""
    png, crc = encoded(RED), struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + struct.pack(">I", len(data)) + kind + data + crc + png[33:]


def with_segment(marker, data):
    """RED as a turned JPEG with one more segment in front."""
    jpeg = with_exif(TURN)
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


TURN = (0x0112, 3, struct.pack("<H", 6))
ODD_METADATA = {
    "turned, and a text that is a float": (with_exif(TURN, (0x0131, 11, struct.pack("<f", 1.5))), (30, 40)),
    "turned, and a negative width": (with_exif((0x0100, 9, struct.pack("<i", -5)), TURN), (30, 40)),
    "Exif that is cut off": (with_chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\3"), (40, 30)),
    "long text": (with_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1_200_000))), (40, 30)),
    "long profile": (with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1_200_000))), (40, 30)),
    "cut JFIF segment": (with_segment(0xE0, b"JFIF\0\1"), (30, 40)),
    "cut color profile": (with_segment(0xE2, b"ICC_PROFILE\0\1"), (30, 40)),
    "text with a wrong checksum": (with_chunk(b"tEXt", b"a\0b").replace(b"a\0b", b"a\0c"), (40, 30)),
}


@pytest.mark.parametrize("name", ODD_METADATA)
def test_metadata_that_cannot_be_read_is_ignored(name):
    data, size = ODD_METADATA[name]
    image, plain = decode(data)
    assert image.size == size
    assert np.abs(np.asarray(image, int) - RED.getpixel((0, 0))).max() < 5
    assert not plain


def test_damaged_pixels_are_refused_whatever_the_metadata():
    with pytest.raises(ImageError, match="truncated"):
        open_image(ODD_METADATA["long text"][0][:-40])


def heic(image=RED, **options):
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=90, **options)
    return file.getvalue()


def test_heic_and_avif_are_read():
    image, plain = decode(heic())
    assert (image.mode, image.size, plain) == ("RGB", (40, 30), False)
    assert np.abs(np.asarray(image, int) - RED.getpixel((0, 0))).max() < 8
    assert decode(encoded(RED, "AVIF"))[1]


def test_heic_is_limited_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(pillow_heif.HeifImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"megapixels.*shrink"):
        open_image(heic())
    with pytest.raises(ImageError, match="truncated"):
        open_image(heic()[:200])


def test_heic_without_the_extra_names_it(monkeypatch):
    data = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(FormatError, match=r"pip install 'foodextract\[heic\]'"):
        open_image(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"no image at all", "format"),
        (b"\xff\xd8\xff", "format"),
        (encoded(RED)[:-40], "truncated"),
        (encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:600], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "format"),
    ],
)
def test_bad_files_are_named_with_a_reason(data, words):
    with pytest.raises(ImageError, match=words):
        open_image(data)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_too_many_pixels_are_refused_before_decoding(side, monkeypatch):
    data = encoded(Image.new("1", (side, side)))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert side**2 > MAX_PIXELS
    with pytest.raises(ImageError, match=r"megapixels.*shrink"):
        open_image(data)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="null byte"):
        open_image("a\0b.jpg")


def test_pil_images_that_cannot_be_used_are_named(monkeypatch):
    lazy = Image.open(io.BytesIO(encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:1500]))
    with pytest.raises(ImageError, match="damaged or truncated"):
        open_image(lazy)
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        open_image(Image.new("RGB", (0, 5)))
    monkeypatch.setattr("foodextract.images.MAX_PIXELS", 24)
    with pytest.raises(ImageError, match="5 x 5 pixels"):
        open_image(Image.new("RGB", (5, 5)))


def test_folders_are_searched_in_path_order(tmp_path):
    for name in ("b.jpg", "a/c.PNG", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list(find_images([tmp_path, tmp_path / "a" / "notes.txt"]))
    assert [path.name for path in found] == ["c.PNG", "b.jpg", "notes.txt"]


def test_arrays_are_read_as_images():
    array = np.asarray(RED)
    assert np.array_equal(open_image(array), array)
    assert open_image(array[:, :, 0]).getpixel((0, 0)) == (200, 200, 200)
    assert open_image(np.dstack([array, np.zeros((30, 40), np.uint8)])).getpixel((0, 0)) == (255, 255, 255)
    for wrong in (array.astype(float), array[None], np.zeros((0, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)):
        with pytest.raises(ImageError, match="of uint8"):
            open_image(wrong)


def test_every_image_below_a_folder_is_found_and_others_are_named(tmp_path, caplog):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    taken = ["IMG.JPG", "a.jfif", "b.jpe", "c.heic", "d.avif", "no suffix", "sub/e.png"]
    left = [
        "._IMG.JPG",
        ".DS_Store",
        ".hidden/f.png",
        "__MACOSX/g.png",
        ".thumbnails/h.png",
        "@eaDir/i.jpg",
        "metadata.jsonl",
    ]
    named = ["j.psd", "README", "sub/k.svg", "sub/l.cr2"]
    for name in [*taken, *left, *named, "../elsewhere/m.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(RED) if name == "no suffix" else b"x")
    (root / "album").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "same").symlink_to(root / "sub")
    found = [path.relative_to(root).as_posix() for path in find_images([root])]
    assert found == sorted([*taken, "album/m.png"])
    assert caplog.messages == [f"passed over 4 files in {root}, in no format we read: README, j.psd, sub/k.svg, …"]


def test_a_hidden_folder_that_is_named_is_searched(tmp_path):
    (tmp_path / ".photos").mkdir()
    (tmp_path / ".photos" / "a.jpg").write_bytes(b"x")
    assert [path.name for path in find_images([tmp_path / ".photos"])] == ["a.jpg"]

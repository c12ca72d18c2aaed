import io
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from foodextract.data import near_duplicates
from foodextract.data.near_duplicates import FINGERPRINT_BYTES, NEIGHBORS, fingerprint, group_near
from foodextract.data.scenes import draw_scenes, sprite


def crop(image, left, top, right, bottom):
    """Cut these shares off the edges."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def resize(image, scale):
    return image.resize([round(edge * scale) for edge in image.size])


CHANGES = {
    "the same": lambda image: image.copy(),
    "resized": lambda image: resize(image, 0.4),
    "squeezed": lambda image: image.resize((224, 160)),
    "recompressed": lambda image: jpeg(image, 30),
    "mirrored": ImageOps.mirror,
    "cropped all round": lambda image: crop(image, 0.05, 0.05, 0.05, 0.05),
    "cropped at two edges": lambda image: crop(image, 0.05, 0.05, 0, 0),
    "cropped off center": lambda image: crop(image, 0.01, 0.04, 0.04, 0.01),
    "all at once": lambda image: jpeg(resize(ImageOps.mirror(crop(image, 0.02, 0.01, 0.03, 0.04)), 0.6), 50),
}


def texture(seed, size=(240, 180)):
    """Colored noise with the spectrum of photographs: amplitude falls with frequency."""
    rng = np.random.default_rng(seed)
    width, height = size
    fall = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width).clip(1) ** -1.3
    planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) * fall, s=(height, width))
    planes /= planes.std((1, 2), keepdims=True)
    levels = planes[[0, 0, 0]] * 45 + planes * rng.uniform(5, 15, (3, 1, 1)) + rng.uniform(90, 150, (3, 1, 1))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def blank(*color, size=(64, 48)):
    return Image.new("RGB", size, color)


def near_blank(count, seed=0):
    """Fingerprints of white images that differ by a gray level here and there."""
    cells = np.full((count, FINGERPRINT_BYTES), 250, np.uint8) - np.random.default_rng(seed).integers(
        0, 2, (count, FINGERPRINT_BYTES)
    )
    return [row.astype(np.uint8).tobytes() for row in cells]


def fade(one, other, steps=41):
    """Fingerprints of the images on the way from one to another."""
    return [fingerprint(Image.blend(one, other, share)) for share in np.linspace(0, 1, steps)]


def parts(groups):
    """Return the groups as sets of positions."""
    return {frozenset(p for p, group in enumerate(groups) if group == name) for name in set(groups)}


@pytest.fixture(scope="module")
def scenes():
    """Drawn scenes that show something: JPEG moves a plain color further than two plain colors may differ."""
    return [scene.image for scene in draw_scenes(21, "train", 90) if scene.objects]


@pytest.fixture(scope="module")
def textures():
    return [texture(seed) for seed in range(30)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_again(scenes, textures, change):
    images = scenes[:50] + textures
    copies = [CHANGES[change](image) for image in images]
    groups = group_near([fingerprint(image) for image in images + copies])
    assert groups[: len(images)] == list(range(len(images)))  # each alone …
    missed = [number for number, group in enumerate(groups[len(images) :]) if group != number]  # … but for its own copy
    assert len(missed) <= 1, missed


def test_all_copies_of_an_image_make_one_group(textures):
    images = [change(image) for image in textures[:3] for change in CHANGES.values()]
    assert group_near([fingerprint(image) for image in images]) == [
        i // len(CHANGES) * len(CHANGES) for i in range(len(images))
    ]


def test_different_images_stay_apart(scenes, textures):
    images = scenes + textures
    assert group_near([fingerprint(image) for image in images]) == list(range(len(images)))


def test_different_dishes_on_the_same_plate_stay_apart(textures):
    images = []
    for code in ("1F34E", "1F34C", "1F354", "1F382"):  # apple, banana, hamburger, cake: a quarter of the width each
        table, dish = textures[0].copy(), sprite(code).resize((64, 64))
        ImageDraw.Draw(table).ellipse((60, 30, 180, 150), fill="white")
        table.paste(dish, (88, 58), dish)
        images.append(table)
    assert group_near([fingerprint(image) for image in images]) == [0, 1, 2, 3]


def test_groups_do_not_depend_on_order_nor_on_batches(scenes, textures, monkeypatch):
    images = scenes[:40] + textures[:10]
    images += [
        CHANGES[change](image) for image in images[::3] for change in ("mirrored", "cropped all round", "recompressed")
    ]
    fingerprints = [fingerprint(image) for image in images] + near_blank(60) + fade(textures[-1], textures[-2])
    groups = group_near(fingerprints)
    assert 55 < len(set(groups)) < len(images)
    assert all(
        groups[group] == group <= position for position, group in enumerate(groups)
    )  # each is called by its first
    assert group_near(fingerprints) == groups
    for seed, batch in enumerate((7, 64, near_duplicates.BATCH)):
        monkeypatch.setattr(near_duplicates, "BATCH", batch)
        order = random.Random(seed).sample(range(len(fingerprints)), len(fingerprints))
        shuffled = group_near([fingerprints[old] for old in order])
        assert {frozenset(order[new] for new in part) for part in parts(shuffled)} == parts(groups)


def test_a_group_has_the_position_of_its_first_image(textures):
    images = [
        textures[0],
        textures[1],
        resize(textures[0], 0.5),
        textures[1],
        crop(textures[0], 0.05, 0.05, 0.05, 0.05),
    ]
    assert group_near([fingerprint(image) for image in images]) == [0, 1, 0, 1, 0]


def test_a_chain_of_small_steps_does_not_join_its_ends(textures):
    steps = fade(textures[0], textures[1])
    assert all(group_near(steps[at : at + 2]) == [0, 0] for at in range(40))  # every link of the chain is there
    groups = group_near(steps)
    assert len(set(groups)) < 20  # neighbors are together …
    assert max(len(part) for part in parts(groups)) < 20  # … but never half the chain
    assert groups[0] != groups[-1]


def test_blank_images_may_differ_by_a_level():
    gray = bytes([128]) * FINGERPRINT_BYTES
    third = FINGERPRINT_BYTES // 3
    assert group_near(
        [gray, gray[:third] + bytes([129]) * third + gray[:third], bytes([140]) * third + gray[third:]]
    ) == [0, 0, 2]


def test_blank_and_tiny_images():
    colors = [(255, 255, 255), (0, 0, 0), (200, 40, 40), (40, 200, 40), (200, 190, 40)]
    images = [blank(*color) for color in colors] + [blank(*color, size=(1, 1)) for color in colors]
    images += [texture(0, (2, 2)), texture(1, (3, 1)), texture(2, (1, 700)), texture(3, (4, 4))]
    assert group_near([fingerprint(image) for image in images]) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 10, 11, 12, 13]


def test_many_blank_images_are_one_group_without_others(textures):
    fingerprints = near_blank(300) + [fingerprint(image) for image in textures]
    assert group_near(fingerprints) == [0] * 300 + list(range(300, 330))


def test_the_work_is_linear_in_the_number_of_images():
    """The index cannot tell random cells apart, nor blank ones: without a bound all pairs would be compared."""
    random_cells = np.random.default_rng(0).integers(0, 256, (16_000, FINGERPRINT_BYTES), dtype=np.uint8)
    blank_cells = np.array([np.frombuffer(given, np.uint8) for given in near_blank(4_000)])
    cells = np.concatenate([random_cells, blank_cells]).reshape(-1, 3, near_duplicates.GRID, near_duplicates.GRID)
    batches = [(len(one), len(other)) for one, other, _ in near_duplicates._candidates(cells)]
    compared = sum(one for one, _ in batches)
    assert len(cells) * NEIGHBORS < compared <= len(cells) * 2 * (NEIGHBORS + 1)
    assert all(one == other <= near_duplicates.BATCH for one, other in batches)


def test_fingerprints_are_small_and_of_one_size():
    modes = [
        Image.new(mode, size)
        for mode, size in (("RGB", (1, 1)), ("L", (300, 5)), ("RGBA", (9, 9)), ("RGB", (1500, 1000)))
    ]
    assert {len(fingerprint(image)) for image in modes} == {FINGERPRINT_BYTES}
    assert FINGERPRINT_BYTES <= 512
    assert fingerprint(texture(1)) == fingerprint(texture(1)) != fingerprint(texture(2))


def test_no_image_and_one_image():
    assert group_near([]) == []
    assert group_near([bytes(FINGERPRINT_BYTES)]) == [0]
    with pytest.raises(ValueError, match="fingerprint 1 has 3 bytes"):
        group_near([bytes(FINGERPRINT_BYTES), b"abc"])

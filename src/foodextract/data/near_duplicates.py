"""Find near-duplicate images: resized, recompressed as JPEG, mirrored, or cropped by up to 5 % per side.

The fingerprint of an image is 12 x 12 cells of color, 432 bytes. Pairs are found in two steps:

1. An index (a k-d tree over 13 numbers: mean color, contrast, low frequencies; mirroring changes none) returns the
   nearest images of every image, and of its middle as a crop would leave it. The work grows with n, not with n².
2. Each pair is compared cell by cell after the best small shift and zoom. The remaining difference, relative to the
   contrast of the images, is their distance: 0 for equal cells, about 1 for unrelated images.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageFilter
from scipy.fft import dctn
from scipy.interpolate import CubicSpline
from scipy.sparse import coo_array, csr_array
from scipy.spatial import KDTree

GRID = 12  # cells along an edge
FINGERPRINT_BYTES = 3 * GRID * GRID
# 99 % of photographs cropped by 5 % per side lie within 0.25. Different photographs of dishes on the same plate and
# table start at 0.33, drawn scenes at 0.45.
NEAR = 0.28  # largest distance of near-duplicates
LOOSE = 0.42  # largest distance from the hub of a group to a member
NOISE = np.array([2, 4, 4], np.float32)  # levels of Y, Cb, Cr that JPEG changes; lower contrast counts as none
ZOOM = 0.91  # the middle that is looked up besides the whole; the fit allows for other crops
REACH = 0.32  # search radius of the index; 98 % of photographs cropped by 5 % at two edges lie within
NEIGHBORS = 12  # candidates per look-up, so that many near-blank images cost no more than others
UNLIKE = 1.0  # pairs that differ by more than their contrast are not fitted
BATCH = 2048  # images or pairs at a time: about 50 MB

_CELLS = np.arange(GRID)
_SPLINE = CubicSpline(_CELLS, np.eye(GRID))
_SLOPE = (_SPLINE.derivative()(_CELLS) * GRID).astype(np.float32)  # cells → their slopes, in levels per width
_MIDDLE = _SPLINE((_CELLS + 0.5 - GRID / 2) * ZOOM + GRID / 2 - 0.5).astype(np.float32)  # cells → cells of the middle
_PLACE = ((_CELLS + 0.5) / GRID - 0.5).astype(np.float32)  # positions of the cells, -0.5 to 0.5
_WAVES = [(p, v, u) for p, top in enumerate((2, 1, 1)) for v in range(3) for u in range(3) if 0 < v + u <= top]
_LOW = tuple(np.array(_WAVES).T)  # plane and frequencies


def fingerprint(image: Image.Image) -> bytes:
    """Return the FINGERPRINT_BYTES of an image of any size: (3, GRID, GRID) cells of YCbCr."""
    fine = image.convert("RGB").resize((4 * GRID, 4 * GRID), Image.Resampling.BILINEAR, reducing_gap=3.0)
    # A blur of 0.7 cells avoids aliasing: a crop changes sharper cells in ways that no shift or zoom undoes.
    cells = fine.filter(ImageFilter.GaussianBlur(2.4)).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(cells.convert("YCbCr")).transpose(2, 0, 1).tobytes()


def group_near(fingerprints: Sequence[bytes]) -> list[int]:
    """Return for every image the first position in its group of near-duplicates, its own where it is alone.

    A group grows along pairs from its hub, the image with the most pairs, and contains only what resembles the hub, so
    a chain of small differences does not join unrelated images. The groups do not depend on the order of the images.
    Raises ValueError for bytes that are no fingerprint.
    """
    for position, given in enumerate(fingerprints):
        if len(given) != FINGERPRINT_BYTES:
            size = f"{len(given)} bytes, not {FINGERPRINT_BYTES}"
            raise ValueError(f"fingerprint {position} has {size}: make it with `fingerprint`")
    distinct = sorted(set(fingerprints))
    cells = np.frombuffer(b"".join(distinct), np.uint8).reshape(-1, 3, GRID, GRID)
    links = _near_pairs(cells)
    degrees = np.diff(links.indptr)
    hubs, free = np.arange(len(cells)), degrees > 0
    for hub in np.argsort(-degrees, kind="stable")[: free.sum()]:  # ties in order of content, not of position
        if not free[hub]:
            continue
        ring = np.append(hub, links.indices[links.indptr[hub] : links.indptr[hub + 1]])
        ring = ring[free[ring]]
        while len(ring):
            free[ring], hubs[ring] = False, hub
            ring = np.unique(links[ring].indices)
            ring = ring[free[ring]]
            ring = ring[_resemblance(cells[hub], cells[ring]) <= LOOSE]
    hub_of = dict(zip(distinct, hubs.tolist(), strict=True))
    first: dict[int, int] = {}  # hub → position
    return [first.setdefault(hub_of[given], position) for position, given in enumerate(fingerprints)]


def _near_pairs(cells: np.ndarray) -> csr_array:
    """Return which of n different images are near-duplicates: (n, n), symmetric.

    Among more than NEIGHBORS similar images not every pair is found.
    """
    found = [np.empty((0, 2), int)]
    for one, other, crop in _candidates(cells):
        near = _distances(_middle(cells[one]) if crop else cells[one], cells[other]) <= NEAR
        found.append(np.column_stack([one[near], other[near]]))
    a, b = np.concatenate(found).T
    one_way = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(cells), len(cells)))
    return (one_way + one_way.T).tocsr()


def _middle(cells: np.ndarray) -> np.ndarray:
    return _MIDDLE @ cells.astype(np.float32) @ _MIDDLE.T


def _contrast(cells: np.ndarray) -> np.ndarray:
    """Return the spread of the cells of each plane in levels, at least NOISE: (n, 3, 1, 1)."""
    return np.sqrt(cells.var((2, 3)) + NOISE**2)[:, :, None, None]


def _keys(cells: np.ndarray) -> np.ndarray:
    """Return the positions of images in the index: (n, 13). Mirroring only changes the signs of odd frequencies."""
    cells = cells.astype(np.float32)
    contrast = _contrast(cells)
    waves = np.abs(dctn(cells, axes=(2, 3), norm="ortho")) / GRID
    spread = np.log(contrast).mean((1, 2, 3))[:, None]
    return np.hstack([waves[:, :, 0, 0] / 50, spread / 2, (waves / contrast)[:, *_LOW]])


def _candidates(cells: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield at most BATCH pairs to compare: ones, others, and whether the middle of the ones was looked up."""
    batches = [cells[start : start + BATCH] for start in range(0, len(cells), BATCH)]
    if not batches:
        return
    tree = KDTree(np.vstack([_keys(batch) for batch in batches]), leafsize=32)
    for number, batch in enumerate(batches):
        for crop in (False, True):
            keys = _keys(_middle(batch) if crop else batch)
            # eps: the outer fifth of REACH is searched only where that is free, which halves the time
            found = tree.query(keys, NEIGHBORS + 1, eps=0.25, distance_upper_bound=REACH, workers=-1)[1]
            row, rank = np.nonzero(found < len(cells))
            one, other = number * BATCH + row, found[row, rank]
            one, other = one[one != other], other[one != other]
            for at in range(0, len(one), BATCH):
                yield one[at : at + BATCH], other[at : at + BATCH], crop


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how `a` and `b`, mirrored or not, differ beyond a small shift and zoom: (n,), infinite for unlike images.

    The fit is one Gauss-Newton step: a shift by t and a stretch by s change a cell by (t + s * place) * slope.
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    mirrored = ((a - b[..., ::-1]) ** 2).sum((1, 2, 3)) < ((a - b) ** 2).sum((1, 2, 3))
    b = np.where(mirrored[:, None, None, None], b[..., ::-1], b)
    contrast = np.sqrt(_contrast(a) * _contrast(b))
    a, b = a / contrast, b / contrast
    distances = np.full(len(a), np.inf)
    close = ((a - b) ** 2).mean((1, 2, 3)) <= UNLIKE**2
    mean, difference = (a[close] + b[close]) / 2, (a[close] - b[close]).reshape(-1, FINGERPRINT_BYTES, 1)
    across, down = mean @ _SLOPE.T, _SLOPE @ mean
    moves = np.stack([across, across * _PLACE, down, down * _PLACE[:, None]], 1).reshape(-1, 4, FINGERPRINT_BYTES)
    normal = moves @ moves.transpose(0, 2, 1) + 1e-3 * np.eye(4, dtype=np.float32)  # a blank image has no slope to fit
    fit = np.linalg.solve(normal, moves @ difference).clip(-0.15, 0.15)
    distances[close] = np.sqrt(((difference - moves.transpose(0, 2, 1) @ fit) ** 2).mean((1, 2)))
    return distances


def _resemblance(hub: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the distances of images from the hub, where either may be a crop of the other: (n,)."""
    found = [np.empty(0)]
    for start in range(0, len(cells), BATCH):
        others = cells[start : start + BATCH]
        hubs = np.broadcast_to(hub, others.shape)
        ways = (hubs, others), (_middle(hubs), others), (hubs, _middle(others))
        found.append(np.min([_distances(a, b) for a, b in ways], axis=0))
    return np.concatenate(found)

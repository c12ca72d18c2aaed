"""Peers that know no language: what answering without looking, and looking without writing, are worth.

Both answer an image with the canonical text of a record that they have seen in the training split, so they go through the same
evaluation as every model. A fine-tuned model that does not beat them has learned nothing that a table of examples does not hold.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from foodextract.inference.extractor import Extractor
from foodextract.schema import FoodRecord


@dataclass(frozen=True)
class Majority:
    """Answers every image with the most frequent training record; of several, with the one that came first."""

    text: str

    @classmethod
    def fit(cls, records: Iterable[FoodRecord]) -> Self:
        """Raises ValueError without records."""
        counts = Counter(record.to_json() for record in records)
        if not counts:
            raise ValueError("no training records: a majority needs at least one")
        return cls(counts.most_common(1)[0][0])

    def __call__(self, image: Image.Image) -> str:
        return self.text


@dataclass(frozen=True)
class Nearest:
    """Answers with the record of the training image that the frozen vision tower finds most alike (cosine).

    Of `k` > 1 neighbors the record that most of them have wins, and among equals the nearest one's.
    """

    extractor: Extractor
    index: NearestNeighbors
    texts: list[str]

    @classmethod
    def fit(
        cls,
        extractor: Extractor,
        images: Iterable[Image.Image],
        records: Sequence[FoodRecord],
        k: int = 1,
        batch: int = 32,
    ) -> Self:
        """Raises ValueError when there are fewer than `k` images, or not one record an image."""
        stream, features = iter(images), []
        while part := list(islice(stream, batch)):
            features.append(vision_features(extractor, part))
        count = sum(map(len, features))
        if count != len(records) or not 1 <= k <= count:
            raise ValueError(
                f"{k} nearest of {count} images with {len(records)} records: give a record an image, and at least {k}"
            )
        index = NearestNeighbors(n_neighbors=k, metric="cosine").fit(torch.cat(features).numpy())
        return cls(extractor, index, [record.to_json() for record in records])

    def __call__(self, image: Image.Image) -> str:
        [nearest] = self.index.kneighbors(vision_features(self.extractor, [image]).numpy(), return_distance=False)
        return Counter(self.texts[place] for place in nearest).most_common(1)[0][
            0
        ]  # counts in order, so equals stay nearest first


@torch.inference_mode()
def vision_features(extractor: Extractor, images: list[Image.Image]) -> torch.Tensor:
    """What the vision tower sees in each RGB image, averaged over patches and tiles: (B, d) float32 on the CPU."""
    model, processor = extractor.model.eval(), extractor.processor
    inputs = processor.image_processor([[image] for image in images], return_tensors="pt").to(model.device, model.dtype)
    seen = model.model.get_image_features(inputs["pixel_values"], inputs.get("pixel_attention_mask"), return_dict=True)
    tiles = [
        len(tokens) // processor.image_seq_len for tokens in seen.pooler_output
    ]  # empty tiles, which only pad the batch, are left out
    return torch.stack([mine.float().mean((0, 1)) for mine in seen.last_hidden_state.split(tiles)]).cpu()

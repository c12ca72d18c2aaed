"""Baselines without a language model: a constant answer, and the answer of the nearest training image.

Both return the canonical text of a training record, so they are evaluated like any model. A fine-tuned model that does
not beat them has learned nothing that a table of examples does not hold.
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
    """Answers every image with the most frequent training record; of several, with the first."""

    text: str

    @classmethod
    def fit(cls, records: Iterable[FoodRecord]) -> Self:
        """Raises ValueError without records."""
        counts = Counter(record.to_json() for record in records)
        if not counts:
            raise ValueError("no training records: a majority needs at least one")
        return cls(counts.most_common(1)[0][0])

    def answer(self, images: Sequence[Image.Image]) -> list[str]:
        return [self.text] * len(images)


@dataclass(frozen=True)
class Nearest:
    """Answers with the record of the training image whose features from the frozen vision tower are most similar
    (cosine).

    Of k > 1 neighbors the most frequent record wins; of several, the nearest one's.
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
        """Raises ValueError when there are fewer than `k` images, or not one record per image."""
        stream, features = iter(images), []
        while part := list(islice(stream, batch)):
            features.append(vision_features(extractor, part))
        count = sum(map(len, features))
        if count != len(records) or not 1 <= k <= count:
            found = f"{k} nearest of {count} images with {len(records)} records"
            raise ValueError(f"{found}: give one record per image, and at least {k}")
        index = NearestNeighbors(n_neighbors=k, metric="cosine").fit(torch.cat(features).numpy())
        return cls(extractor, index, [record.to_json() for record in records])

    def answer(self, images: Sequence[Image.Image]) -> list[str]:
        return [self._answer_one(image) for image in images]  # one by one: features must not depend on the batch

    def _answer_one(self, image: Image.Image) -> str:
        [nearest] = self.index.kneighbors(vision_features(self.extractor, [image]).numpy(), return_distance=False)
        return Counter(self.texts[place] for place in nearest).most_common(1)[0][0]  # equal counts stay nearest first


@torch.inference_mode()
def vision_features(extractor: Extractor, images: list[Image.Image]) -> torch.Tensor:
    """Return the vision tower's features of RGB images, averaged over patches and tiles: (B, d) float32 on the CPU."""
    model, processor = extractor.model.eval(), extractor.processor
    inputs = processor.image_processor([[image] for image in images], return_tensors="pt").to(model.device, model.dtype)
    seen = model.model.get_image_features(inputs["pixel_values"], inputs.get("pixel_attention_mask"), return_dict=True)
    # Empty tiles only pad the batch; the pooled output says how many tiles each image really has.
    tiles = [len(tokens) // processor.image_seq_len for tokens in seen.pooler_output]
    return torch.stack([mine.float().mean((0, 1)) for mine in seen.last_hidden_state.split(tiles)]).cpu()

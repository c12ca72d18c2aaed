"""A BLIP that captions an image with its class, as a source of the same records.

The captioner only chooses among the classes it was trained on. It cannot say that there is no food, and names at most
one item.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from pydantic import ValidationError
from rapidfuzz import fuzz, process
from transformers import BatchFeature, BlipForConditionalGeneration, BlipProcessor, PretrainedConfig

from foodextract.data.label_rules.vocabulary import field_of
from foodextract.images import ImageSource, open_image
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import PRECISIONS, ModelError, choose_device, load_weights
from foodextract.models.precision import choose_precision
from foodextract.schema import AnswerError, FoodRecord

TARGET = "a photo of delicious {}"  # the caption to train on
MIN_SIMILARITY = 70  # rapidfuzz's ratio, 0 to 100, for a text to count as a class name: "sushis" is sushi (91)
MAX_NEW_TOKENS = 20


def load(
    model_id: str | os.PathLike[str], device: str | None = None, precision: str | None = None, tiles: int | None = None
) -> "Answerer":
    """Load a BLIP as a captioner, and any other model as an extractor. Raises ModelError."""
    try:
        kind = PretrainedConfig.get_config_dict(model_id)[0].get("model_type")
    except Exception:  # the extractor names the problem
        kind = None
    if kind != "blip":
        return Extractor.from_pretrained(model_id, device, precision, tiles=tiles)
    if tiles not in (None, Captioner.tiles):
        raise ModelError(f"{model_id} is a BLIP, which takes an image whole: leave the tiles out")
    return Captioner.from_pretrained(model_id, device, precision)


class Captioner:
    """A BLIP, its processor, and the record of each class by its number."""

    tiles = 1

    def __init__(
        self, model: BlipForConditionalGeneration, processor: BlipProcessor, records: Mapping[int, FoodRecord]
    ) -> None:
        self.model, self.processor, self.records = model, processor, records

    @classmethod
    def from_pretrained(
        cls, model_id: str | os.PathLike[str], device: str | None = None, precision: str | None = None
    ) -> Self:
        """Load a folder or a Hub id whose config.json names the classes in `id2label`. Raises ModelError."""
        where = choose_device(device)
        if precision not in (None, *PRECISIONS) or precision == "int8":
            raise ModelError(f"precision {precision!r} is not for a BLIP: choose fp32, bf16 or fp16")
        dtype = PRECISIONS[precision] if precision else choose_precision(where, training=False).weights
        try:
            model: BlipForConditionalGeneration = load_weights(BlipForConditionalGeneration, model_id, dtype=dtype)
            processor = BlipProcessor.from_pretrained(model_id)
            labels: dict[int, str] = model.config.id2label  # type: ignore[assignment]  # integer keys
            names = {number: label.replace("_", " ") for number, label in sorted(labels.items())}
            records = {number: _record(name) for number, name in names.items()}
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ModelError(f"{model_id} has a class name that no record can hold ({reason}): shorten it") from error
        except ModelError:
            raise
        except Exception as error:  # transformers and safetensors raise some twenty types here
            raise ModelError(f"{model_id} cannot be loaded as a BLIP ({error}): save or download it again") from error
        if all(re.fullmatch(r"LABEL \d+", name) for name in names.values()):  # transformers' default names
            raise ModelError(f"{model_id} does not name its classes: put them into its config.json, as id2label")
        return cls(model.to(where).eval(), processor, records)  # type: ignore[arg-type]

    def prepare_image(self, image: ImageSource) -> BatchFeature:
        """Open and preprocess one image: `pixel_values` (1, 3, P, P) float32. Raises ImageError."""
        return self.processor(images=open_image(image), return_tensors="pt")

    @torch.inference_mode()
    def extract_prepared(
        self, images: Sequence[BatchFeature], wanted: Callable[[int], bool] = lambda number: True, batch_size: int = 8
    ) -> list[tuple[FoodRecord, None] | AnswerError]:
        """Return the results for images from `prepare_image`, in order. Captions are short, so `wanted` is ignored."""
        results: list[tuple[FoodRecord, None] | AnswerError] = []
        for first in range(0, len(images), batch_size):
            batch = [image["pixel_values"] for image in images[first : first + batch_size]]
            pixels = torch.cat(batch).to(self.model.device, self.model.dtype)
            written = self.model.generate(pixel_values=pixels, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            results += map(self._result, self.processor.batch_decode(written, skip_special_tokens=True))
        return results

    def _result(self, caption: str) -> tuple[FoodRecord, None] | AnswerError:
        number = to_number(caption, {number: record.image_title for number, record in self.records.items()})
        if number is None:
            return AnswerError(f"the caption {caption!r} names none of {len(self.records)} classes")
        return self.records[number], None


Answerer = Extractor | Captioner  # a server uses `tiles`, `prepare_image` and `extract_prepared` of either


def save(
    model: BlipForConditionalGeneration, processor: BlipProcessor, names: Sequence[str], folder: str | os.PathLike[str]
) -> None:
    """Save a BLIP with its class names, in the order of their numbers, for `load`."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(Path(folder))
    processor.save_pretrained(Path(folder))


def to_number(text: str, names: Mapping[int, str]) -> int | None:
    """Return the number of the class that a caption names by number or nearly by name, or None."""
    said = text.lower().strip().removeprefix(TARGET.format("").strip()).strip()
    if re.fullmatch(r"[0-9]+", said):
        return int(said) if int(said) in names else None
    found = process.extractOne(said, names, scorer=fuzz.ratio, score_cutoff=MIN_SIMILARITY)
    return found[2] if found else None


def _record(name: str) -> FoodRecord:
    food, drink = ([], [name]) if field_of(name) == "drink_items" else ([name], [])
    return FoodRecord(is_food=1, image_title=name, food_items=food, drink_items=drink)

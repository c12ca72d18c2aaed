"""A BLIP that captions an image with its class → the same records: by the class's name, whether it writes the name or the number.

An extractor finds what is in an image; this one only chooses among the classes it was trained on. It cannot say that there is no food, and
names one thing at most.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import ValidationError
from rapidfuzz import fuzz, process
from transformers import (
    BatchFeature,
    BlipForConditionalGeneration,
    BlipProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from foodextract.data.label_rules.vocabulary import field_of
from foodextract.images import ImageSource, open_image
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import PRECISIONS, ModelError, choose_device, choose_precision
from foodextract.schema import AnswerError, FoodRecord

TARGET = "a photo of delicious {}"  # what a caption is trained to say
ALIKE = 70  # rapidfuzz's ratio, 0 to 100, from which on a text counts as a class name: "sushis" is sushi (91)
MAX_NEW_TOKENS = 20


def load(
    model_id: str | os.PathLike, device: str | None = None, precision: str | None = None, tiles: int | None = None
) -> "Answerer":
    """Who answers with the model in a folder or on the Hub: a captioner for a BLIP, an extractor for all others. Raises ModelError."""
    try:
        kind = PretrainedConfig.get_config_dict(model_id)[0].get("model_type")
    except Exception:  # the extractor says what is wrong
        kind = None
    if kind != "blip":
        return Extractor.from_pretrained(model_id, device, precision, tiles=tiles)
    if tiles not in (None, Captioner.tiles):
        raise ModelError(f"{model_id} is a BLIP, which takes an image whole: leave the tiles out")
    return Captioner.from_pretrained(model_id, device, precision)


@dataclass(frozen=True)
class Captioner:
    """A model, its processor, and the record of each class by its number."""

    model: PreTrainedModel
    processor: ProcessorMixin
    records: dict[int, FoodRecord]
    tiles: ClassVar[int] = 1

    @classmethod
    def from_pretrained(
        cls, model_id: str | os.PathLike, device: str | None = None, precision: str | None = None
    ) -> Self:
        """Load a folder or a Hub id whose config.json names the classes in `id2label`. Raises ModelError."""
        where = choose_device(device)
        if precision not in (None, *PRECISIONS) or precision == "int8":
            raise ModelError(f"precision {precision!r} is not for a BLIP: choose fp32, bf16 or fp16")
        dtype = PRECISIONS[precision] if precision else choose_precision(where, training=False).weights
        try:
            model = BlipForConditionalGeneration.from_pretrained(model_id, dtype=dtype)
            processor = BlipProcessor.from_pretrained(model_id)
            records = {
                number: _record(label.replace("_", " ")) for number, label in sorted(model.config.id2label.items())
            }
        except ValidationError as error:
            raise ModelError(
                f"{model_id} has a class name that no record can hold ({error.errors()[0]['msg']}): shorten it"
            ) from error
        except Exception as error:  # transformers and safetensors raise some twenty types here
            raise ModelError(f"{model_id} cannot be loaded as a BLIP ({error}): save or download it again") from error
        if all(
            re.fullmatch(r"LABEL \d+", record.image_title) for record in records.values()
        ):  # what a config says that was told no names
            raise ModelError(f"{model_id} does not name its classes: put them into its config.json, as id2label")
        return cls(model.to(where).eval(), processor, records)

    def read(self, image: ImageSource) -> BatchFeature:
        """One image as the model takes it: `pixel_values` (1, 3, P, P) float32. Raises ImageError."""
        return self.processor(images=open_image(image), return_tensors="pt")

    @torch.inference_mode()
    def answer_read(
        self, images: Sequence[BatchFeature], wanted: Callable[[int], bool] = lambda number: True, batch_size: int = 8
    ) -> list[tuple[FoodRecord, None] | AnswerError]:
        """The results for images that `read` has prepared, in order. All are answered, `wanted` or not: a caption is soon written."""
        results = []
        for first in range(0, len(images), batch_size):
            batch = [image["pixel_values"] for image in images[first : first + batch_size]]
            pixels = torch.cat(batch).to(self.model.device, self.model.dtype)
            written = self.model.generate(pixel_values=pixels, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            results += map(self._read, self.processor.batch_decode(written, skip_special_tokens=True))
        return results

    def _read(self, caption: str) -> tuple[FoodRecord, None] | AnswerError:
        number = to_number(caption, {number: record.image_title for number, record in self.records.items()})
        if number is None:
            return AnswerError(f"the caption {caption!r} names none of {len(self.records)} classes")
        return self.records[number], None


Answerer = Extractor | Captioner  # what a server needs of either: `tiles`, `read` and `answer_read`


def save(model: PreTrainedModel, processor: ProcessorMixin, names: Sequence[str], folder: str | os.PathLike) -> None:
    """Write a BLIP with the names of its classes, in the order of their numbers, for `load`."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(Path(folder))
    processor.save_pretrained(Path(folder))


def to_class(text: str, names: Sequence[str]) -> str | None:
    """The class among `names`, in the order of their numbers, that a caption names; None when there is none."""
    number = to_number(text, dict(enumerate(names)))
    return None if number is None else names[number]


def to_number(text: str, names: Mapping[int, str]) -> int | None:
    """The number of the class that a caption names by number or (nearly) by name, behind the target's words or alone, or None."""
    said = text.lower().strip().removeprefix(TARGET.format("").strip()).strip()
    if re.fullmatch(r"[0-9]+", said):
        return int(said) if int(said) in names else None
    found = process.extractOne(said, names, scorer=fuzz.ratio, score_cutoff=ALIKE)
    return found[2] if found else None


def _record(name: str) -> FoodRecord:
    drink = field_of(name) == "drink_items"
    return FoodRecord(
        is_food=1, image_title=name, food_items=[] if drink else [name], drink_items=[name] if drink else []
    )

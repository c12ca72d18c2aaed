"""How sure is the model that a picture shows food or drink, and how often is it right when it is that sure?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from foodextract import prompts
from foodextract.evaluation import rate
from foodextract.extractor import Extractor
from foodextract.models import ModelError
from foodextract.schema import FoodRecord

YES = FoodRecord(is_food=1, image_title="", food_items=[], drink_items=[])


@dataclass(frozen=True)
class Bin:
    """Pictures of about the same probability: its mean, and the share that really shows food or drink with its 95 % interval."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


@torch.inference_mode()
def food_probabilities(extractor: Extractor, pictures: Sequence[Image.Image], batch_size: int = 32) -> list[float]:
    """P(1) / (P(0) + P(1)) where the answer says `is_food`, of each RGB picture. Raises ModelError where 0 and 1 are not single tokens."""
    model, processor = extractor.model.eval(), extractor.processor
    whole = processor.apply_chat_template(prompts.conversation() + prompts.answer(YES))
    begun = whole[: whole.rindex(YES.to_json()) + YES.to_json().index("1")]
    no, yes = processor.tokenizer([begun + "0", begun + "1"]).input_ids
    if no[:-1] != yes[:-1] or len(no) != len(yes):
        raise ModelError("the tokenizer does not make one token of the 0 or 1 behind is_food, so their probabilities cannot be compared")
    found: list[float] = []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        inputs = processor(
            text=[begun + "1"] * len(batch),
            images=[[picture] for picture in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        logits = model(**inputs, logits_to_keep=2).logits[:, 0].float()  # the last position is the 1 itself
        found += logits[:, [no[-1], yes[-1]]].softmax(-1)[:, 1].tolist()
    return found


def reliability(labels: Sequence[FoodRecord], probabilities: Sequence[float], bins: int = 10) -> list[Bin]:
    """The bins of equal width that have pictures, from 0 to 1."""
    truth, said = np.array([bool(label.is_food) for label in labels]), np.asarray(probabilities)
    place = np.minimum((said * bins).astype(int), bins - 1)
    found = []
    for number in np.unique(place):
        share = rate("", truth[place == number].tolist())
        found.append(Bin(float(said[place == number].mean()), share.value, share.low, share.high, share.n))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error (Naeini et al. 2015): by how much the probabilities are off, on average over pictures."""
    return sum(b.n * abs(b.predicted - b.observed) for b in bins) / sum(b.n for b in bins)

"""Pictures → answers: the one door between a model and everybody who asks it."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from foodextract import prompts
from foodextract.models import ModelError, choose_device, load_model, load_processor
from foodextract.pictures import PictureError, open_picture
from foodextract.schema import AnswerError, FoodRecord

Picture = str | os.PathLike | bytes | Image.Image
MAX_NEW_TOKENS = 256
FOOD = FoodRecord(is_food=1, image_title="", food_items=[], drink_items=[])


@dataclass(frozen=True)
class Extractor:
    """A model and its processor, asked with the one prompt."""

    model: PreTrainedModel
    processor: ProcessorMixin

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike, device: str | None = None) -> Self:
        """Load a folder or a Hub id. Raises ModelError."""
        return cls(load_model(model_id, choose_device(device)), load_processor(model_id))

    @torch.inference_mode()
    def answer(self, pictures: list[Image.Image]) -> list[str]:
        """What the model writes about each RGB picture: greedy, unconstrained, exactly as written but for the template's leading space."""
        training = self.model.training
        self.model.eval()
        prompt = self.processor.apply_chat_template(prompts.conversation(), add_generation_prompt=True)
        inputs = self.processor(
            text=[prompt] * len(pictures),
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        written = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        self.model.train(training)
        texts = self.processor.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.removeprefix(" ") for text in texts]

    def extract(self, picture: Picture) -> FoodRecord:
        """The record of one picture. Raises PictureError or AnswerError."""
        return FoodRecord.parse(self.answer([open_picture(picture)])[0])

    def extract_many(self, pictures: Iterable[Picture], batch_size: int = 8) -> Iterator[FoodRecord | PictureError | AnswerError]:
        """One result a picture, in order: its record, or the error that this picture met. Others in its batch are answered all the same."""
        stream = iter(pictures)
        while batch := list(islice(stream, batch_size)):
            opened = [_try_open(picture) for picture in batch]
            readable = [picture for picture in opened if isinstance(picture, Image.Image)]
            answers = iter(self.answer(readable) if readable else [])
            for picture in opened:
                if isinstance(picture, PictureError):
                    yield picture
                    continue
                try:
                    yield FoodRecord.parse(answer := next(answers))
                except AnswerError as error:
                    yield AnswerError(f"the model's answer is {error}; it wrote {answer!r}")

    @torch.inference_mode()
    def food_probabilities(self, pictures: list[Image.Image]) -> list[float]:
        """P(1) / (P(0) + P(1)) at the place where the answer to each RGB picture says `is_food`.

        Raises ModelError for a tokenizer that does not make one token of that 0 or 1.
        """
        whole = self.processor.apply_chat_template(prompts.conversation() + prompts.answer(FOOD))
        begun = whole[: whole.rindex(FOOD.to_json()) + FOOD.to_json().index("1")]
        no, yes = self.processor.tokenizer([begun + "0", begun + "1"]).input_ids
        if no[:-1] != yes[:-1] or len(no) != len(yes):
            raise ModelError("the tokenizer joins the 0 or 1 of is_food to what is before it, so their probabilities cannot be read off")
        inputs = self.processor(
            text=[begun + "1"] * len(pictures),
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        training = self.model.training
        self.model.eval()
        logits = self.model(**inputs, logits_to_keep=2).logits[:, 0].float()  # the last position is the 1 itself
        self.model.train(training)
        return logits[:, [no[-1], yes[-1]]].softmax(-1)[:, 1].tolist()


def _try_open(picture: Picture) -> Image.Image | PictureError:
    try:
        return open_picture(picture)
    except PictureError as error:
        return error

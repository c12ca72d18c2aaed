"""Rows → tensors and labels.

Labels are the answer and EOS, exactly: no prompt, no image token, no padding, and not the newline that SmolVLM's chat
template writes after EOS. The answer keeps its leading space, which a model writes first: the prompt ends in
`Assistant:`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import v2
from transformers import ProcessorMixin

IGNORED = -100  # the label that cross-entropy skips


@dataclass
class Collator:
    """Turn rows (`images`, `prompt`, `completion`) into the model's input, padded on the right.

    Shapes for B rows, S tokens, T tiles of P x P pixels: `input_ids`, `attention_mask` and `labels` (B, S) int64;
    `pixel_values` (B, T, 3, P, P) float32; `pixel_attention_mask` (B, T, P, P) int64. `augment` changes an image at
    random.
    """

    processor: ProcessorMixin
    completion_only_loss: bool = True
    augment: Callable[[Any], Any] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [self.processor.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
        images = [[self.augment(image) for image in row["images"]] if self.augment else row["images"] for row in rows]
        batch = self.processor(text=prompts, images=images, add_special_tokens=False)  # the template wrote them
        answers = [self.answer_text(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        answer_ids = self.processor.tokenizer(answers, add_special_tokens=False).input_ids
        pixels = {key: value for key, value in batch.items() if key.startswith("pixel")}
        return {
            **pad(batch["input_ids"], answer_ids, self.processor, self.completion_only_loss),
            **{key: torch.stack([torch.as_tensor(one) for one in value]) for key, value in pixels.items()},
        }

    def answer_text(self, row: dict[str, Any], prompt: str) -> str:
        """The text that the template writes after the generation prompt, up to and including EOS.

        Raises ValueError for a template that does not end the answer with EOS.
        """
        whole = self.processor.apply_chat_template(row["prompt"] + row["completion"])
        answer, end, _ = whole[len(prompt) :].rpartition(self.processor.tokenizer.eos_token)
        if not whole.startswith(prompt) or not end:
            raise ValueError("the chat template does not end its answer with EOS, so labels would be wrong")
        return answer + end


def pad(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    processor: ProcessorMixin,
    completion_only_loss: bool = True,
    width: int = 0,
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` (B, S) of prompts and answers. S is `width`, or the longest row's."""
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    rows.append(torch.zeros(width, dtype=torch.int64))  # sets the least width
    ids = pad_sequence(rows, batch_first=True, padding_value=processor.tokenizer.pad_token_id)[:-1]
    place = torch.arange(ids.shape[1])
    starts, ends = (torch.tensor([[len(one)] for one in each]) for each in (prompts, rows[:-1]))
    seen = place < ends
    target = seen & (place >= starts) if completion_only_loss else seen & (ids != image_token_of(processor))
    return {"input_ids": ids, "attention_mask": seen.long(), "labels": ids.masked_fill(~target, IGNORED)}


def image_token_of(processor: Any) -> int:
    """The id of the placeholder that stands for an image."""
    return processor.image_token_id


def augmentation(edge: int) -> Callable[[Any], Any]:
    """Mirror, rotate, crop and recolor an image (PIL or uint8 tensor) of `edge` x `edge` pixels at random."""
    return v2.Compose(
        [
            v2.Resize((edge, edge)),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(10, v2.InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(edge, scale=(0.75, 1), ratio=(0.9, 1.1)),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        ]
    )


def audit(processor: ProcessorMixin, batch: dict[str, torch.Tensor], row: int = 0) -> list[tuple[str, bool]]:
    """Decode one row token by token, with whether the token carries a label. Padding is left out."""
    kept = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][kept], batch["labels"][row][kept]
    return [
        (processor.tokenizer.decode([token]), bool(label != IGNORED)) for token, label in zip(ids, labels, strict=True)
    ]

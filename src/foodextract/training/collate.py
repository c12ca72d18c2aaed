"""Rows → tensors and labels, and the audit that shows which tokens the loss sees.

Labels are the answer and EOS, exactly: no prompt, no image token, no padding, and not the newline that SmolVLM's chat template
puts behind EOS. The answer's leading space belongs to it: the generation prompt ends in `Assistant:`, so the space is the first thing
a model writes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows (`images`, `prompt`, `completion`) into what the model's forward takes, padded on the right.

    Shapes for B rows, S tokens, T tiles of P x P pixels: `input_ids`, `attention_mask` and `labels` (B, S) int64; `pixel_values`
    (B, T, 3, P, P) float32; `pixel_attention_mask` (B, T, P, P) int64.
    """

    processor: ProcessorMixin

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        texts = [self.processor.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
        batch = self.processor(
            text=texts, images=[row["images"] for row in rows], add_special_tokens=False
        )  # the template has written them
        answers = tokenizer(
            [self.answer_text(row, text) for row, text in zip(rows, texts, strict=True)], add_special_tokens=False
        )
        sequences = [
            (torch.tensor(prompt), torch.tensor(answer))
            for prompt, answer in zip(batch["input_ids"], answers.input_ids, strict=True)
        ]
        padded = torch.nn.utils.rnn.pad_sequence
        ids = [torch.cat(pair) for pair in sequences]
        labels = [torch.cat([torch.full_like(prompt, IGNORED), answer]) for prompt, answer in sequences]
        return {
            "input_ids": padded(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": padded(labels, batch_first=True, padding_value=IGNORED),
            **{
                key: torch.stack([torch.as_tensor(one) for one in value])
                for key, value in batch.items()
                if key.startswith("pixel")
            },
        }

    def answer_text(self, row: dict[str, Any], prompt: str) -> str:
        """What the template writes behind the generation prompt, up to and including EOS."""
        whole = self.processor.apply_chat_template(row["prompt"] + row["completion"])
        answer, end, _ = whole[len(prompt) :].rpartition(self.processor.tokenizer.eos_token)
        if not whole.startswith(prompt) or not end:
            raise ValueError(
                "the chat template does not end its answer with EOS behind the generation prompt, so labels would be wrong"
            )
        return answer + end


def audit(processor: ProcessorMixin, batch: dict[str, torch.Tensor], row: int = 0) -> list[tuple[str, bool]]:
    """The tokens of one row as text, each with whether the loss sees it; padding is left out."""
    kept = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][kept], batch["labels"][row][kept]
    return [
        (processor.tokenizer.decode([token]), bool(label != IGNORED)) for token, label in zip(ids, labels, strict=True)
    ]

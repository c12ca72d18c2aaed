"""Average the weights of two models that were trained from the same one.

    python experiments/photo_base/average.py FIRST SECOND OUT --share 0.4

A point on the line between two fine-tuned models often answers as well as either ("model soups",
https://arxiv.org/abs/2203.05482).
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from make_base import save
from transformers import PreTrainedModel

from foodextract.models.loading import load_model, load_processor
from foodextract.models.training_data import TrainingData


def average(first: Path, second: Path, share: float) -> PreTrainedModel:
    """Return the model (1 - share) * first + share * second, in fp32. Raises ValueError if their parameters differ."""
    model, other = (load_model(folder, torch.device("cpu"), training=True) for folder in (first, second))
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())  # tied ones once
    if {name: one.shape for name, one in mine.items()} != {name: one.shape for name, one in theirs.items()}:
        raise ValueError(f"{first} and {second} are models of different shapes")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.lerp_(theirs[name], share)
    return model


def main(
    first: Annotated[Path, typer.Argument(help="Folder of the first model; its processor is kept.")],
    second: Annotated[Path, typer.Argument(help="Folder of the second.")],
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Weight of the second model.")],
) -> None:
    """Average two models."""
    save(average(first, second, share), load_processor(first), out)
    if data := TrainingData.find(second):
        data.write(out)


if __name__ == "__main__":
    typer.run(main)

"""Average the weights of two models that were trained from the same one.

    python experiments/photo_base/average.py SHORT LONG OUT

A point on the line between two fine-tuned models often answers as well as either ("model soups",
https://arxiv.org/abs/2203.05482). The bundled photo model lies between a short and a long stage 2: the long one names
more of the photographs, the short one also the cookies that README shows.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from make_base import save
from transformers import PreTrainedModel

from foodextract.models.loading import load_model, load_processor
from foodextract.models.training_data import TrainingData

SHARE = 0.4  # of the long one: the largest tenth at which README's pizza, pancakes and cookies are all named correctly


def average(short: Path, long: Path, share: float) -> PreTrainedModel:
    """Return the model (1 - share) * short + share * long, in fp32. Raises ValueError if their parameters differ."""
    model, other = (load_model(folder, torch.device("cpu"), training=True) for folder in (short, long))
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())  # tied ones once
    if {name: one.shape for name, one in mine.items()} != {name: one.shape for name, one in theirs.items()}:
        raise ValueError(f"{short} and {long} are models of different shapes")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.lerp_(theirs[name], share)
    return model


def main(
    short: Annotated[Path, typer.Argument(help="Folder of the first model; its processor is kept.")],
    long: Annotated[Path, typer.Argument(help="Folder of the second.")],
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Weight of the second model.")] = SHARE,
) -> None:
    """Average two models."""
    save(average(short, long, share), load_processor(short), out)
    if data := TrainingData.find(short):
        data.write(out)


if __name__ == "__main__":
    typer.run(main)

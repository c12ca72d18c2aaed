"""BLIP learns to caption food: a training loop to read, streamed images, and the way back from a caption to a class
name.

The loop is written out because that was the point of the original. What the original had promised and not kept is
here: seeds, mixed precision, clipping, a bar, checkpoints, resume, class names instead of numbers, augmentation, and
more than one class.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from foodextract.data.scenes import Split, draw_scene, plan_scene
from foodextract.images import open_image
from foodextract.inference.blip import TARGET, to_number
from foodextract.models.loading import ModelError
from foodextract.models.precision import choose_precision
from foodextract.training.collate import IGNORED, augmentation
from foodextract.training.freezing import freeze

__all__ = ["TARGET", "Captioning", "caption", "class_names", "stream", "to_class", "train"]


@dataclass(frozen=True)
class Captioning:
    """The recipe of one run: the vision tower stays frozen, the text decoder trains."""

    base: str  # Hub id or folder, or recipes.TINY
    data: str  # Hub id of a data set with `image` and a `label` of named classes, or "scenes" for drawings
    learning_rate: float
    batch_size: int
    steps: int
    clip: float = 1.0  # largest norm of a step's gradient
    augment: bool = False
    save_every: int = 100  # steps between checkpoints
    buffer: int = 5000  # streamed images among which the next one is drawn; Food-101 comes sorted by class
    seed: int = 42


# --- data


def stream(recipe: Captioning, split: Split, classes: Sequence[str] = ()) -> datasets.IterableDataset:
    """The split as a stream of `image` and `label`; nothing is downloaded or drawn before it is asked for.

    A stream from the Hub reads all its files in turn: Food-101 is sorted by class, so a single file would show a few
    classes only.
    """
    if recipe.data == "scenes":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})
        what = {"seed": recipe.seed, "split": split, "classes": tuple(classes)}
        return datasets.IterableDataset.from_generator(_drawn, features=features, gen_kwargs=what)
    rows = datasets.load_dataset(recipe.data, split={"train": "train", "test": "validation"}[split], streaming=True)
    parts = [rows.shard(rows.num_shards, index) for index in range(rows.num_shards)]
    return datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")


def _drawn(seed: int, split: Split, classes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Endless scenes that show one thing, a food of `classes`."""
    for index in count():
        objects, _ = plan_scene(seed, split, index)
        if len(objects) == 1 and objects[0].name in classes and objects[0].kind == "food":
            bmp = io.BytesIO()
            draw_scene(seed, split, index).image.save(
                bmp, "BMP"
            )  # a stream holds images as files; this kind costs no time
            yield {"image": {"bytes": bmp.getvalue(), "path": None}, "label": classes.index(objects[0].name)}


def class_names(rows: datasets.IterableDataset) -> list[str]:
    """The names of the classes, as captions write them."""
    label = rows.features["label"]
    return [label.int2str(number).replace("_", " ") for number in range(label.num_classes)]


def _shuffled(rows: datasets.IterableDataset, recipe: Captioning) -> Iterator[dict[str, Any]]:
    """Epoch after epoch, each in its own order, the same for the same seed."""
    for epoch in count():
        yield from rows.shuffle(seed=recipe.seed + epoch, buffer_size=recipe.buffer)


def _parts(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def make_batch(
    processor: ProcessorMixin, images: Sequence[Image.Image], captions: Sequence[str], bos: int
) -> dict[str, torch.Tensor]:
    """What the model's forward takes: captions of S tokens (B, S), images (B, 3, P, P), and labels without padding.

    A caption starts with `bos`, as it does when BLIP writes one; the tokenizer would start it with [CLS].
    """
    batch = processor(images=list(images), text=list(captions), padding=True, return_tensors="pt")
    batch["input_ids"][:, 0] = bos
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return {**batch, "labels": labels}


# --- the loop


def train(
    model: PreTrainedModel, processor: ProcessorMixin, recipe: Captioning, rows: datasets.IterableDataset, folder: Path
) -> list[dict[str, float]]:
    """Train the text decoder in place; the log has the loss and the norm of the gradient by step.

    A run that was interrupted goes on at its last checkpoint in `folder` and ends as if it had not been: it passes
    over the images that it has seen, and random numbers go on where they were. Raises ModelError when the loss is not
    a number.
    """
    device, names = model.device, class_names(rows)
    precision = choose_precision(device, training=True)
    torch.manual_seed(recipe.seed)
    freeze(model, ("vision_model",))
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), recipe.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.autocast is torch.float16)
    change = augmented(recipe, processor)
    log = resume(folder, recipe, learning, optimizer, scaler)
    unseen = islice(_shuffled(rows, recipe), len(log) * recipe.batch_size, recipe.steps * recipe.batch_size)
    model.train()
    with tqdm(total=recipe.steps, initial=len(log), desc="captioning", unit="step") as bar:
        for step, part in enumerate(_parts(unseen, recipe.batch_size), len(log) + 1):
            images = [change(open_image(row["image"])) for row in part]
            captions = [TARGET.format(names[row["label"]]) for row in part]
            batch = make_batch(processor, images, captions, model.config.text_config.bos_token_id)
            with torch.autocast(device.type, precision.autocast, enabled=precision.autocast is not None):
                loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the loss became {loss.item()} at step {step}; lower the learning rate ({recipe.learning_rate})"
                )
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(learning.values(), recipe.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            log.append({"step": step, "loss": loss.item(), "grad_norm": norm.item()})
            bar.set_postfix(loss=f"{log[-1]['loss']:.4f}")
            bar.update()
            if step % recipe.save_every == 0:
                checkpoint(folder, recipe, learning, optimizer, scaler, log)
    model.eval()
    return log


def augmented(recipe: Captioning, processor: ProcessorMixin) -> Callable[[Image.Image], Image.Image]:
    """The random change of an image before the model sees it, or none."""
    if not recipe.augment:
        return lambda image: image
    edge = processor.image_processor.size["height"]
    return augmentation(edge)


def checkpoint(folder: Path, recipe: Captioning, learning: dict, optimizer, scaler, log: list) -> None:
    """Write everything that the next step depends on, all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": json.dumps(asdict(recipe)),
        "weights": learning,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    torch.save(state | {"random": random, "log": log}, folder / "checkpoint.partial")
    (folder / "checkpoint.partial").replace(folder / "checkpoint.pt")


def resume(folder: Path, recipe: Captioning, learning: dict, optimizer, scaler) -> list[dict[str, float]]:
    """Take up the checkpoint in `folder`, if there is one of the same recipe, and return its log."""
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True) if path.exists() else {"recipe": None}
    if state["recipe"] != json.dumps(asdict(recipe)):
        return []
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"]["cpu"])
    torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return state["log"]


# --- captions


@torch.inference_mode()
def caption(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image], batch_size: int = 32
) -> list[str]:
    """The model's own words about each image, greedy."""
    texts: list[str] = []
    for part in tqdm(list(_parts(images, batch_size)), desc="captions", unit="batch"):
        pixels = processor(images=part, return_tensors="pt").to(model.device)
        texts += processor.batch_decode(
            model.generate(**pixels, max_new_tokens=20, do_sample=False), skip_special_tokens=True
        )
    return [text.strip() for text in texts]


def to_class(text: str, names: Sequence[str]) -> str | None:
    """The class that a caption names, or None. `names` are in the order of their numbers."""
    number = to_number(text, dict(enumerate(names)))
    return None if number is None else names[number]

"""Rows worked out once, so that a training step only gathers them.

A plain collator decodes, resizes, normalizes and tokenizes every image again in every epoch, in the way of the device that waits for it.
Here that happens once: images as uint8 on disk (memory-mapped; normalized on the device),
tokens as one array of fixed width. What all rows begin with, the system message, is kept once as `prefix`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import datasets
import numpy as np
import torch
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from foodextract.data.dataset import as_conversations
from foodextract.models.loading import ModelError
from foodextract.training.collate import IGNORED, Collator

CHUNK = 32  # rows that one worker prepares at a time
PIXELS = "pixels.npy"
ROUND = 8  # the width of `tokens`, and of a batch, is a multiple of this, which is what matrix units like


@dataclass(frozen=True)
class Prepared:
    """N rows of S tokens behind L shared ones, with at most T tiles of P x P pixels. Arrays are memory-mapped."""

    prefix: torch.Tensor  # (1, L) int64: what every row begins with, up to the first image token at most
    tokens: np.ndarray  # (N, S) int32: the rest of each row, padded on the right
    answers: np.ndarray  # (N, 2) int32: where in `tokens` the answer starts, and where the row ends
    pixels: np.ndarray | None  # (N, T, 3, P, P) uint8; None where `features` stand for them
    tiles: np.ndarray  # (N,) int32: how many of the T tiles are real
    shape: tuple[int, int]  # (T, P)
    home: Path | None = None  # the folder of these files
    image: int = -1  # the token id of an image's placeholder, which is never a target
    features: torch.Tensor | None = None  # (N, T, patches, d): what a frozen vision tower makes of the pixels
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None  # changes a tile (3, P, P) uint8 at random

    def __len__(self) -> int:
        return len(self.tokens)

    def unshared(self) -> "Prepared":
        """The same rows, each with its own copy of what all begin with."""
        shared = np.broadcast_to(self.prefix.numpy().astype(np.int32), (len(self), self.prefix.shape[1]))
        tokens = np.concatenate([shared, self.tokens], 1)
        return replace(self, prefix=self.prefix[:, :0], tokens=tokens, answers=self.answers + shared.shape[1])

    def gather(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch of B rows: `input_ids` and `labels` (B, S), `attention_mask` (B, L + S), `tiles` (B,); all int64.

        S is that of the longest row here, up to ROUND: one label of seven items would else make all batches half as wide again. With it
        `features` (B, T, patches, d) where there are any, else `pixels` (B, T, 3, P, P) uint8.
        """
        rows = np.asarray(rows)
        width = -(-int(self.answers[rows, 1].max()) // ROUND) * ROUND
        tokens = torch.from_numpy(self.tokens[rows, :width].astype(np.int64))
        start, end = torch.from_numpy(self.answers[rows].astype(np.int64)).unsqueeze(1).unbind(2)
        place = torch.arange(tokens.shape[1])
        seen = torch.cat([torch.ones(len(rows), self.prefix.shape[1], dtype=torch.bool), place < end], 1)
        batch = {
            "input_ids": tokens,
            "labels": tokens.masked_fill((place < start) | (place >= end) | (tokens == self.image), IGNORED),
            "attention_mask": seen.long(),
            "tiles": torch.from_numpy(self.tiles[rows].astype(np.int64)),
        }
        if self.features is not None:
            return batch | {"features": self.features[torch.from_numpy(rows)]}
        pixels = torch.from_numpy(self.pixels[rows])
        if self.augment:
            pixels = torch.stack([self.augment(image) for image in pixels[:, 0]])[:, None]
        return batch | {"pixels": pixels}


def normalize(pixels: torch.Tensor, tiles: torch.Tensor, image_processor) -> torch.Tensor:
    """uint8 (B, T, 3, P, P) → what the image processor makes of them, float32; tiles that only fill up are 0, as the model expects."""
    mean = torch.tensor(image_processor.image_mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std, device=pixels.device).view(3, 1, 1)
    return (
        (pixels.float() * image_processor.rescale_factor - mean)
        / std
        * real(tiles, pixels.shape[1])[:, :, None, None, None]
    )


def real(tiles: torch.Tensor, most: int) -> torch.Tensor:
    """(B, most) bool: which places hold a tile, `tiles` (B,) being their number."""
    return torch.arange(most, device=tiles.device) < tiles[:, None]


def prepare(
    split: datasets.Dataset,
    processor: ProcessorMixin,
    folder: str | Path,
    target: str = "json",
    *,
    with_pixels: bool = True,
) -> Prepared:
    """Prepare a split of the data set below `folder`, or reuse what an earlier run prepared there from the same rows and settings.

    `target` is what answers are written as; see `prompts.answer`. Without `with_pixels` the file of pixels is not needed: where it was
    deleted to save disk, it is not written again.
    Raises ModelError when the processor does more to an image than resize, rescale and normalize it.
    """
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer |= {"padding": None, "truncation": None}  # left over from its last call, and of no matter here
    settings = processor.to_json_string() + json.dumps(tokenizer) + str(processor.chat_template)
    key = hashlib.sha256((split._fingerprint + settings + target).encode()).hexdigest()[:16]
    home = Path(folder) / f"prepared-{key}"
    ready = home / "ready.json"  # written last
    if not ready.is_file() or (with_pixels and not (home / PIXELS).is_file()):
        home.mkdir(parents=True, exist_ok=True)
        ready.unlink(missing_ok=True)
        ready.write_text(json.dumps(_prepare(split, processor, home, target)))
    facts = json.loads(ready.read_text())
    arrays = {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in ("tokens", "answers", "tiles")}
    pixels = np.load(home / PIXELS, mmap_mode="r") if with_pixels else None
    shape = most_tiles(processor.image_processor), processor.image_processor.max_image_size["longest_edge"]
    return Prepared(
        torch.tensor([facts["prefix"]]), pixels=pixels, shape=shape, image=processor.image_token_id, home=home, **arrays
    )


def whole_text(prepared: Prepared) -> Prepared:
    """The same rows with all text as target, prompt and tile markers too. Nothing is shared then: each row has the prefix to itself."""
    rows = prepared.unshared()
    answers = rows.answers.copy()
    answers[:, 0] = 0
    return replace(rows, answers=answers)


def _prepare(split: datasets.Dataset, processor: ProcessorMixin, home: Path, target: str) -> dict:
    images, tokenizer = processor.image_processor, processor.tokenizer
    rows, collator = as_conversations(split, target), Collator(processor)
    prompts: dict[tuple, list[int]] = {}  # token ids by text and tile layout: one or a few for a whole data set
    ids, starts = [None] * len(rows), np.zeros(len(rows), np.int32)
    tiles = np.zeros(len(rows), np.int32)
    most = most_tiles(images)
    edge = images.max_image_size["longest_edge"]
    pixels = np.lib.format.open_memmap(home / PIXELS, "w+", np.uint8, (len(rows), most, 3, edge, edge))
    reserve(home / PIXELS)

    def work(start: int) -> int:
        numbers = range(start, min(start + CHUNK, len(rows)))
        for number in numbers:
            row = rows[number]
            text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
            raw = images(
                [row["images"]], do_rescale=False, do_normalize=False, return_row_col_info=True, return_tensors="pt"
            )
            layout = (text, raw["rows"][0][0], raw["cols"][0][0])
            if layout not in prompts:
                whole = processor(text=[text], images=[row["images"]], add_special_tokens=False, return_tensors="pt")
                ours = normalize(
                    raw["pixel_values"].to(torch.uint8), torch.tensor([raw["pixel_values"].shape[1]]), images
                )
                if not torch.allclose(ours, whole["pixel_values"], atol=1e-5):
                    raise ModelError(
                        f"{type(images).__name__} does more than resize, rescale and normalize: train with fast=False"
                    )
                prompts[layout] = whole["input_ids"][0].tolist()
            answer = tokenizer(collator.answer_text(row, text), add_special_tokens=False).input_ids
            ids[number], starts[number] = prompts[layout] + answer, len(prompts[layout])
            tiles[number] = raw["pixel_values"].shape[1]
            pixels[number, : tiles[number]] = raw["pixel_values"][0].to(torch.uint8).numpy()
        return len(numbers)

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(rows), desc="preparing", unit="image") as bar:
        for done in pool.map(work, range(0, len(rows), CHUNK)):
            bar.update(done)
    pixels.flush()
    shared = _shared(list(prompts.values()), processor.image_token_id)
    width = -(-max(len(row) - shared for row in ids) // ROUND) * ROUND
    tokens = np.full((len(rows), width), tokenizer.pad_token_id, np.int32)
    for number, row in enumerate(ids):
        tokens[number, : len(row) - shared] = row[shared:]
    np.save(home / "tokens.npy", tokens)
    np.save(
        home / "answers.npy",
        np.stack([starts - shared, np.array([len(row) for row in ids]) - shared], 1).astype(np.int32),
    )
    np.save(home / "tiles.npy", tiles)
    return {"prefix": ids[0][:shared]}


def _shared(prompts: list[list[int]], image: int) -> int:
    """How many tokens all `prompts` begin with, up to the first image token."""
    prompts = [prompt[: prompt.index(image)] if image in prompt else prompt for prompt in prompts]
    pairs = zip(min(prompts), max(prompts), strict=False)  # what the first and the last in order share, all share
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def most_tiles(image_processor) -> int:
    """The most tiles that an image can become: the overview alone, or with up to (longest edge / tile)² details."""
    if not image_processor.do_image_splitting:
        return 1
    return 1 + round(image_processor.size["longest_edge"] / image_processor.max_image_size["longest_edge"]) ** 2


def reserve(path: Path) -> None:
    """Take the disk space of a memory-mapped file at once, or delete it. Raises OSError when there is not enough.

    A mapping made of holes would find the disk full at some later write, and the kernel ends a process for that (SIGBUS).
    """
    with open(path, "r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise


def augmentation(edge: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mirroring, a crop, a small rotation and other light: what a photographer might have done differently to a tile of `edge` pixels."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(10, v2.InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(edge, scale=(0.75, 1), ratio=(0.9, 1.1)),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        ]
    )


def features_shape(model: PreTrainedModel, prepared: Prepared) -> torch.Size:
    """(N, T, patches, d) of `vision_features`."""
    vision = model.config.vision_config
    return torch.Size(
        [len(prepared), prepared.shape[0], (vision.image_size // vision.patch_size) ** 2, vision.hidden_size]
    )


def are_stored(path: Path) -> bool:
    """Whether an earlier call of `vision_features` finished the file at `path`."""
    return path.is_file() and path.with_suffix(".done").is_file()


@torch.inference_mode()
def vision_features(
    model: PreTrainedModel, prepared: Prepared, image_processor, path: Path, dtype: torch.dtype, batch: int = 32
) -> torch.Tensor:
    """What a frozen vision tower sees in every row: (N, T, patches, d) in `dtype`, the type of the arithmetic.

    Memory-mapped at `path`, and taken from there when an earlier call had finished.
    """
    shape, finished, done = features_shape(model, prepared), are_stored(path), path.with_suffix(".done")
    features = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)
    reserve(path)
    if finished:
        return features
    with tqdm(total=len(prepared), desc="looking once", unit="image") as bar:
        for start in range(0, len(prepared), batch):
            rows = slice(start, min(start + batch, len(prepared)))
            pixels = torch.tensor(prepared.pixels[rows], device=model.device)
            tiles = torch.tensor(prepared.tiles[rows], device=model.device)
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                seen = model.model.vision_model(
                    normalize(pixels, tiles, image_processor).flatten(0, 1)
                ).last_hidden_state
            features[rows] = seen.view(-1, *shape[1:]).to("cpu", dtype)
            bar.update(len(pixels))
    done.touch()
    return features

"""Rows prepared once, so that a training step only gathers them.

`Collator` decodes, resizes and tokenizes every image again in every epoch, while the device waits. `PreparedRows`
returns the same batches from files: images as uint8 (memory-mapped, normalized on the device) and, where the vision
tower is frozen, its features. `datasets` reads a batch of 16 such images in 67 ms, a memory-mapped array in 2 ms.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from foodextract.data.dataset import as_conversations, rows_id
from foodextract.models.loading import ModelError, image_budget
from foodextract.models.weights import checksum
from foodextract.training.collate import Collator, image_token_of, pad
from foodextract.training.throughput import Step

PIXELS = "pixels.npy"
ROUND = 8  # the tokens of a batch, without the shared ones, are padded to a multiple of this, as matrix units like it


@dataclass(eq=False)
class PreparedRows:
    """The rows of a split, and their collator: called with `{"row": number}` dicts, it returns a batch.

    A batch has `input_ids`, `attention_mask` and `labels` as `Collator` makes them; `tiles` (B,), the number of real
    tiles; `pixels` (B, T, 3, P, P) uint8 or `features` (B, T, patches, d); and `shared`, the number of tokens with
    which all rows begin, up to the first image token at most. The text model reads those once a batch.
    """

    processor: ProcessorMixin
    home: Path
    prompts: list[list[int]]  # token ids, one list for each tile layout
    rows: list[tuple[int, list[int]]]  # number of the prompt, and token ids of the answer
    tiles: np.ndarray  # (N,) int64
    pixels: Any  # (N, T, 3, P, P) uint8; None where `features` replace them
    features: torch.Tensor | None = None  # (N, T, patches, d)
    shared: int = 0
    completion_only_loss: bool = True
    augment: Callable[[Any], Any] | None = None  # changes a tile (3, P, P) at random

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        numbers = [row["row"] for row in rows]
        prompts, answers = [self.prompts[self.rows[n][0]] for n in numbers], [self.rows[n][1] for n in numbers]
        own = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) - self.shared
        width = self.shared + -(-own // ROUND) * ROUND
        batch: dict[str, Any] = pad(prompts, answers, self.processor, self.completion_only_loss, width)
        batch |= {"shared": self.shared, "tiles": torch.from_numpy(self.tiles[numbers])}
        if self.features is not None:
            return batch | {"features": self.features[torch.tensor(numbers)]}
        pixels = torch.from_numpy(self.pixels[numbers])
        if self.augment:
            pixels = torch.stack([self.augment(image) for image in pixels[:, 0]])[:, None]
        return batch | {"pixels": pixels}

    def step(self, batch: int, vision: str) -> Step:
        """The mean work of one image in training, with `vision` "frozen" or "trained"."""
        answer = np.mean([len(answer) for _, answer in self.rows])
        tokens = answer + np.mean([len(self.prompts[prompt]) for prompt, _ in self.rows])
        targets = answer if self.completion_only_loss else tokens
        vision = vision if self.features is None else "cached"
        return Step(float(self.tiles.mean()), float(tokens) - self.shared, self.shared, batch, float(targets), vision)

    def close(self) -> None:
        """Unmap the files, so that deleting them frees the disk."""
        self.pixels = self.features = None


def normalize(pixels: torch.Tensor, tiles: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """uint8 (B, T, 3, P, P) → float32, as the image processor normalizes them. Tiles beyond `tiles` (B,) are 0."""
    mean = torch.tensor(image_processor.image_mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std, device=pixels.device).view(3, 1, 1)
    scaled = (pixels.float() * image_processor.rescale_factor - mean) / std
    return scaled * is_real(tiles, pixels.shape[1])[:, :, None, None, None]


def is_real(tiles: torch.Tensor, most: int) -> torch.Tensor:
    """(B, most) bool: the places that hold a tile, where image b has `tiles[b]` of them."""
    return torch.arange(most, device=tiles.device) < tiles[:, None]


def home_of(split: datasets.Dataset, processor: ProcessorMixin, folder: str | Path, target: str = "json") -> Path:
    """Where `prepare` keeps these rows. The name depends on the rows, the processor and the form of the answers."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer |= {"padding": None, "truncation": None}  # left over from its last call
    settings = processor.to_json_string() + json.dumps(tokenizer) + str(processor.chat_template)
    key = hashlib.sha256((rows_id(split) + settings + target).encode()).hexdigest()[:16]
    return Path(folder) / f"prepared-{key}"


def prepare(
    split: datasets.Dataset,
    processor: ProcessorMixin,
    folder: str | Path,
    target: str = "json",
    *,
    completion_only_loss: bool = True,
    with_pixels: bool = True,
) -> PreparedRows:
    """Prepare a split below `folder`, or reuse what an earlier run prepared there from the same rows and settings.

    `target` is the form of the answers (`prompts.answer`). `with_pixels` writes a missing file of pixels again.
    Raises ModelError for an image processor that does more than resize, rescale and normalize.
    """
    home = home_of(split, processor, folder, target)
    ready = home / "rows.json"  # written last
    if not ready.is_file() or (with_pixels and not (home / PIXELS).is_file()):
        home.mkdir(parents=True, exist_ok=True)
        ready.unlink(missing_ok=True)
        (home / "rows.partial").write_text(json.dumps(_prepare(split, processor, home, target)))
        (home / "rows.partial").replace(ready)
    values = json.loads(ready.read_text())
    shared = _shared(values["prompts"], image_token_of(processor)) if completion_only_loss else 0
    return PreparedRows(
        processor,
        home,
        values["prompts"],
        values["rows"],
        tiles=np.array(values["tiles"]),
        pixels=np.load(home / PIXELS, mmap_mode="r") if with_pixels else None,
        shared=shared,
        completion_only_loss=completion_only_loss,
    )


def _prepare(split: datasets.Dataset, processor: ProcessorMixin, home: Path, target: str) -> dict[str, Any]:
    images, tokenizer, collator = processor.image_processor, processor.tokenizer, Collator(processor)
    conversations = as_conversations(split, target)
    prompts: dict[tuple, list[int]] = {}  # by text and tile layout: one or a few for a whole data set
    edge = images.max_image_size["longest_edge"]
    shape = (len(split), image_budget(processor), 3, edge, edge)
    pixels = np.lib.format.open_memmap(home / PIXELS, "w+", np.uint8, shape)
    reserve(home / PIXELS)

    def work(number: int) -> tuple[tuple, list[int], int]:
        row = conversations[number]
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        exact = {"do_rescale": False, "do_normalize": False}
        raw = images([row["images"]], **exact, return_row_col_info=True, return_tensors="pt")
        tiles = raw["pixel_values"].to(torch.uint8)
        layout = (text, raw["rows"][0][0], raw["cols"][0][0])
        if layout not in prompts:
            whole = processor(text=[text], images=[row["images"]], add_special_tokens=False, return_tensors="pt")
            ours = normalize(tiles, torch.tensor([tiles.shape[1]]), images)
            if not torch.allclose(ours, whole["pixel_values"], atol=1e-5):
                name = type(images).__name__
                raise ModelError(f"{name} does more than resize, rescale and normalize: train with cache=False")
            prompts[layout] = whole["input_ids"][0].tolist()
        pixels[number, : tiles.shape[1]] = tiles[0].numpy()
        answer = tokenizer(collator.answer_text(row, text), add_special_tokens=False).input_ids
        return layout, answer, tiles.shape[1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(tqdm(pool.map(work, range(len(split))), total=len(split), desc="preparing", unit="image"))
    pixels.flush()
    numbers = {layout: number for number, layout in enumerate(prompts)}
    return {
        "prompts": list(prompts.values()),
        "rows": [(numbers[layout], answer) for layout, answer, _ in done],
        "tiles": [tiles for _, _, tiles in done],
    }


def _shared(prompts: list[list[int]], image_token: int) -> int:
    """The number of tokens with which all `prompts` begin, up to the first image token."""
    columns = zip(*prompts, strict=False)
    return len(list(takewhile(lambda tokens: set(tokens) == {tokens[0]} != {image_token}, columns)))


def reserve(path: Path) -> None:
    """Allocate the disk space of a memory-mapped file at once, or delete the file and raise OSError.

    A sparse mapping finds the disk full at some later write, and the kernel then kills the process (SIGBUS).
    """
    with open(path, "r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise


def features_shape(model: PreTrainedModel, rows: PreparedRows) -> torch.Size:
    """(N, T, patches, d) of `vision_features`."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return torch.Size([len(rows), image_budget(rows.processor), patches, vision.hidden_size])


def features_file(home: Path, model: PreTrainedModel, dtype: torch.dtype) -> Path:
    """The file of `vision_features` in the folder of prepared rows, named by the tower's weights and the type."""
    weights = checksum({name: p.detach().cpu() for name, p in model.model.vision_model.named_parameters()})
    return home / f"features-{weights}-{str(dtype).removeprefix('torch.')}.bin"


@torch.inference_mode()
def vision_features(
    model: PreTrainedModel, rows: PreparedRows, path: Path, dtype: torch.dtype, batch: int = 32
) -> torch.Tensor:
    """The output of a frozen vision tower for every row: (N, T, patches, d) in `dtype`, the type of the arithmetic.

    The tensor is memory-mapped at `path`, and read from there when an earlier call finished.
    """
    shape, unfinished = features_shape(model, rows), path.with_suffix(".partial")
    file = path if path.is_file() else unfinished
    features = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype).view(shape)
    if file == path:
        return features
    reserve(file)
    with tqdm(total=len(rows), desc="vision features", unit="image") as bar:
        for start in range(0, len(rows), batch):
            part = slice(start, min(start + batch, len(rows)))
            pixels = torch.tensor(rows.pixels[part], device=model.device)
            tiles = torch.tensor(rows.tiles[part], device=model.device)
            inputs = normalize(pixels, tiles, rows.processor.image_processor).flatten(0, 1)
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                seen = model.model.vision_model(inputs).last_hidden_state
            features[part] = seen.view(-1, *shape[1:]).to("cpu", dtype)
            bar.update(len(pixels))
    unfinished.replace(path)
    return features

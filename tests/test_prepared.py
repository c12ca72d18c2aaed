"""The fast path is the plain path: same tokens, same pixels, same losses, same weights."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from foodextract.data import dataset
from foodextract.models import loading, weights
from foodextract.models.loading import ModelError
from foodextract.training import cache
from foodextract.training import run as training
from foodextract.training.collate import Collator
from foodextract.training.config import Stage

STAGE1 = Stage("stage1", freeze=("model.vision_model",), learning_rate=1e-3, epochs=2, batch_size=4, accumulation=2)
STAGE2 = Stage("stage2", freeze=(), learning_rate=1e-4, epochs=1, batch_size=4, accumulation=2)


@pytest.mark.parametrize("tiles", [1, 5, 17])
def test_gathered_rows_are_what_the_plain_collator_makes(rows, tmp_path, tiles):
    processor = loading.load_processor(loading.TINY_BASE, tiles=tiles)
    shapes = [(300, 100), (80, 200), (256, 256), (500, 499)]  # other shapes become other numbers of tiles
    wide = [{"image": rows["test"][n]["image"].resize(shape)} for n, shape in enumerate(shapes)]
    split = rows["test"].select(range(4)).map(lambda _, n: wide[n], with_indices=True)
    ready = cache.prepare(split, processor, tmp_path)
    plain = Collator(processor)([dataset.as_conversations(split)[n] for n in range(4)])
    batch = ready.gather([0, 1, 2, 3])
    torch.testing.assert_close(
        cache.normalize(batch["pixels"], batch["tiles"], processor.image_processor),
        plain["pixel_values"],
        rtol=0,
        atol=1e-6,
    )
    for n in range(4):
        kept = torch.cat([ready.prefix[0], batch["input_ids"][n]])[batch["attention_mask"][n].bool()]
        assert torch.equal(kept, plain["input_ids"][n][plain["attention_mask"][n].bool()])
        wanted = plain["labels"][n]
        assert torch.equal(batch["labels"][n][batch["labels"][n] >= 0], wanted[wanted >= 0])
    assert processor.image_token_id not in ready.prefix
    assert ready.prefix.shape[1] > 20  # the system message is shared


def test_a_batch_is_as_wide_as_its_longest_row(rows, processor, tmp_path):
    ready = cache.prepare(rows["train"], processor, tmp_path)
    ends = ready.answers[:, 1]
    short, long = int(ends.argmin()), int(ends.argmax())
    alone, together = ready.gather([short]), ready.gather([short, long])
    width = alone["input_ids"].shape[1]
    assert ends[short] <= width < ends[short] + cache.ROUND
    assert width < together["input_ids"].shape[1] == ready.tokens.shape[1]
    assert alone["attention_mask"].shape[1] == ready.prefix.shape[1] + width
    for name in ("input_ids", "labels"):
        assert torch.equal(alone[name][0], together[name][0, :width])
    assert (together["labels"][0, width:] < 0).all()


def test_prepared_once(rows, processor, tmp_path, monkeypatch):
    first = cache.prepare(rows["test"], processor, tmp_path)
    processor.tokenizer(["a", "a b"], padding=True)  # as the plain path and inference do; the tokenizer remembers it
    monkeypatch.setattr(cache, "_prepare", None)
    again = cache.prepare(rows["test"], processor, tmp_path)
    assert (again.tokens == first.tokens).all()
    with pytest.raises(TypeError):  # other rows are prepared anew
        cache.prepare(rows["train"], processor, tmp_path)


def test_a_processor_that_does_more_is_refused(rows, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "normalize", lambda pixels, tiles, image_processor: pixels.float())
    with pytest.raises(ModelError, match="does more than resize, rescale and normalize: train with fast=False"):
        cache.prepare(rows["test"], processor, tmp_path)


@pytest.mark.parametrize("stage", [STAGE1, STAGE2], ids=lambda stage: stage.name)
def test_fast_and_plain_training_agree(rows, processor, tmp_path, stage):
    logs, ends = {}, {}
    for fast in (True, False):
        model = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
        logs[fast], _ = training.train_stage(
            model, processor, replace(stage, fast=fast), rows["train"], tmp_path / str(fast)
        )
        ends[fast] = weights.snapshot(model)
    assert [entry["loss"] for entry in logs[True]] == pytest.approx([entry["loss"] for entry in logs[False]], rel=2e-4)
    assert [entry["grad_norm"] for entry in logs[True]] == pytest.approx(
        [entry["grad_norm"] for entry in logs[False]], rel=2e-3
    )
    start = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True).state_dict()
    way = torch.cat([(ends[True][name] - start[name]).flatten() for name in ends[True]])
    other = torch.cat([(ends[False][name] - start[name]).flatten() for name in ends[True]])
    assert torch.nn.functional.cosine_similarity(way, other, dim=0) > 0.999


def test_stored_features_are_what_the_tower_sees(base, rows, processor, tmp_path):
    ready = cache.prepare(rows["test"], processor, tmp_path)
    features = cache.vision_features(
        base, ready, processor.image_processor, tmp_path / "features.bin", torch.float32, batch=5
    )
    batch = ready.gather([3, 15])
    with torch.no_grad():
        pixels = cache.normalize(batch["pixels"], batch["tiles"], processor.image_processor)
        seen = base.model.vision_model(pixels.flatten(0, 1)).last_hidden_state
    torch.testing.assert_close(features[[3, 15]].flatten(0, 1), seen)
    assert "pixels" not in replace(ready, features=features).gather([0])


def test_a_full_disk_is_found_before_anything_is_mapped(rows, processor, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "posix_fallocate", full)
        model = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
        with pytest.raises(ModelError, match=r"stage1: the disk of .* is full; free some space and rerun"):
            training.train_stage(model, processor, STAGE1, rows["train"], tmp_path)
    assert not list(tmp_path.rglob("pixels.npy"))
    training.train_stage(model, processor, STAGE1, rows["train"], tmp_path, max_steps=1)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS cannot reserve disk space")
def test_prepared_images_are_on_the_disk_and_no_holes(rows, processor, tmp_path):
    cache.prepare(rows["test"], processor, tmp_path)
    (pixels,) = tmp_path.rglob("pixels.npy")
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(10_000_000)
    cache.reserve(hole)
    for file in (pixels, hole):
        assert file.stat().st_blocks * 512 >= file.stat().st_size

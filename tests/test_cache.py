"""Prepared rows are what the collator makes: the same tokens, pixels, losses and weights."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from foodextract.data.dataset import as_conversations
from foodextract.models import loading
from foodextract.models.loading import ModelError
from foodextract.models.weights import snapshot
from foodextract.training import cache
from foodextract.training.collate import IGNORED, Collator
from foodextract.training.config import Stage

QUICK = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
STAGE1 = Stage("stage1", ("model.vision_model",), learning_rate=1e-3, num_train_epochs=2, **QUICK)
STAGE2 = Stage("stage2", (), learning_rate=1e-4, num_train_epochs=1, **QUICK)


def gather(prepared, numbers):
    return prepared([{"row": number} for number in numbers])


def same_as_the_collator(batch, plain):
    """The same rows, padded to another width."""
    for mine, theirs, padding in (
        ("input_ids", "input_ids", None),
        ("labels", "labels", IGNORED),
        ("attention_mask", "attention_mask", 0),
    ):
        width = plain[theirs].shape[1]
        assert torch.equal(batch[mine][:, :width], plain[theirs])
        assert padding is None or (batch[mine][:, width:] == padding).all()


@pytest.mark.parametrize("tiles", [1, 5, 17])
def test_prepared_rows_are_what_the_collator_makes(rows, tmp_path, tiles):
    processor = loading.load_processor(loading.TINY_BASE, tiles=tiles)
    shapes = [(300, 100), (80, 200), (256, 256), (500, 499)]  # other shapes become other numbers of tiles
    wide = [{"image": rows["test"][n]["image"].resize(shape)} for n, shape in enumerate(shapes)]
    split = rows["test"].select(range(4)).map(lambda _, n: wide[n], with_indices=True)
    prepared = cache.prepare(split, processor, tmp_path)
    plain = Collator(processor)([as_conversations(split)[n] for n in range(4)])
    batch = gather(prepared, range(4))
    pixels = cache.normalize(batch["pixels"], batch["tiles"], processor.image_processor)
    torch.testing.assert_close(pixels, plain["pixel_values"], rtol=0, atol=1e-6)
    same_as_the_collator(batch, plain)
    shared = batch["input_ids"][:, : batch["shared"]]
    assert (shared == shared[0]).all()
    assert processor.image_token_id not in shared
    assert batch["shared"] > 20  # the system message


def test_loss_on_all_text_leaves_out_images_and_padding_only(rows, processor, tmp_path):
    split = rows["train"].select(range(4))
    batch = gather(cache.prepare(split, processor, tmp_path, completion_only_loss=False), range(4))
    kept = (batch["attention_mask"] == 1) & (batch["input_ids"] != processor.image_token_id)
    assert (batch["labels"] != IGNORED).equal(kept)
    assert batch["shared"] == 0  # every row needs the logits of its own prompt
    conversations = as_conversations(split)
    same_as_the_collator(batch, Collator(processor, completion_only_loss=False)([conversations[n] for n in range(4)]))
    text = processor.tokenizer.decode(gather(cache.prepare(split, processor, tmp_path, "repr"), [0])["input_ids"][0])
    assert "{'is_food': " in text


def test_a_batch_is_as_wide_as_its_longest_row(rows, processor, tmp_path):
    prepared = cache.prepare(rows["train"], processor, tmp_path)
    lengths = [len(answer) for _, answer in prepared.rows]
    short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
    alone, together = gather(prepared, [short]), gather(prepared, [short, long])
    width, end = alone["input_ids"].shape[1], int(alone["attention_mask"].sum())
    assert end <= width < end + cache.ROUND
    assert width < together["input_ids"].shape[1]
    for name in ("input_ids", "labels"):
        assert torch.equal(alone[name][0], together[name][0, :width])


def test_prepared_once(rows, processor, tmp_path, monkeypatch):
    first = cache.prepare(rows["test"], processor, tmp_path)
    processor.tokenizer(["a", "a b"], padding=True)  # as inference does; the tokenizer remembers it
    monkeypatch.setattr(cache, "_prepare", None)
    assert cache.prepare(rows["test"], processor, tmp_path).prompts == first.prompts
    with pytest.raises(TypeError):  # other rows are prepared anew
        cache.prepare(rows["train"], processor, tmp_path)


def test_a_processor_that_does_more_is_refused(rows, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "normalize", lambda pixels, tiles, image_processor: pixels.float())
    with pytest.raises(ModelError, match="does more than resize, rescale and normalize: train with cache=False"):
        cache.prepare(rows["test"], processor, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        STAGE1,
        STAGE2,
        replace(STAGE1, name="all settings", unlikelihood_weight=300, completion_only_loss=False, target="repr"),
    ],
    ids=lambda stage: stage.name,
)
def test_training_with_and_without_the_cache_agrees(train, base, stage):
    runs = {cached: train(replace(stage, cache=cached), str(cached)) for cached in (True, False)}
    for name, within in (("loss", 2e-4), ("grad_norm", 2e-3)):
        values = [[entry[name] for entry in run.log] for run in runs.values()]
        assert values[0] == pytest.approx(values[1], rel=within)
    start = snapshot(base)
    ways = [
        torch.cat([(w - start[name]).flatten() for name, w in snapshot(run.model).items()]) for run in runs.values()
    ]
    assert torch.nn.functional.cosine_similarity(*ways, dim=0) > 0.999


def test_stored_features_are_what_the_tower_sees(base, rows, processor, tmp_path):
    prepared = cache.prepare(rows["test"], processor, tmp_path)
    features = cache.vision_features(base, prepared, tmp_path / "features.bin", torch.float32, batch=5)
    batch = gather(prepared, [3, 15])
    with torch.no_grad():
        pixels = cache.normalize(batch["pixels"], batch["tiles"], processor.image_processor)
        seen = base.model.vision_model(pixels.flatten(0, 1)).last_hidden_state
    torch.testing.assert_close(features[[3, 15]].flatten(0, 1), seen)
    assert "pixels" not in gather(replace(prepared, features=features), [0])


def test_a_full_disk_is_found_before_anything_is_mapped(train, base, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "posix_fallocate", full)
        with pytest.raises(ModelError, match=r"stage1: the disk of .* is full; free some space and rerun"):
            train(STAGE1, model=base)
    assert not list(tmp_path.rglob("pixels.npy"))
    train(STAGE1, model=base, max_steps=1)


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

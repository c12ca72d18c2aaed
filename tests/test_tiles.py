"""Checkpoints whose processor cuts an image into many tiles: said aloud, counted in batches, and cut down by `--tiles
1`.
"""

import asyncio
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from foodextract.__main__ import app
from foodextract.data import scenes
from foodextract.inference import blip
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.models.loading import ModelError
from foodextract.serving import server
from foodextract.serving.queue import PREPARED, Queue, QueueLimits
from foodextract.serving.telemetry import ServerMetrics


def with_budget(folder, tiles, out):
    """A copy of a bundled model whose processor spends so many tiles an image."""
    shutil.copytree(folder, out)
    loading.load_processor(folder, tiles).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def many_tiles(tmp_path_factory):
    return with_budget(loading.TINY_TUNED, 17, tmp_path_factory.mktemp("tiles") / "tiny-17")


@pytest.fixture(scope="module")
def images():
    """Squares, which take the whole budget, and ribbons, which take less of it."""
    return [scene.image for scene in scenes.draw_scenes(77, "test", 3)] + [Image.new("RGB", (400, 90), "red")]


@pytest.fixture
def entering():
    """Notes how many images and tiles enter a model at once."""
    hooks, seen = [], []

    def note(model, args, kwargs):
        if "pixel_values" in kwargs:
            seen.append(tuple(kwargs["pixel_values"].shape[:2]))

    def watch(extractor):
        hooks.append(extractor.model.register_forward_pre_hook(note, with_kwargs=True))
        return seen

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("tiles", loading.TILE_BUDGETS)
def test_processor_keeps_its_image_budget(tiles, images):
    processor = loading.load_processor(loading.TINY_TUNED, tiles)
    assert loading.image_budget(processor) == tiles
    counts = [Extractor(None, processor).prepare([image])["pixel_values"].shape[1] for image in images]
    assert max(counts) == tiles
    processor.image_processor.do_image_splitting = False
    assert loading.image_budget(processor) == 1


@pytest.mark.parametrize(("tiles", "batch_size", "at_once"), [(17, 8, 1), (5, 8, 1), (5, 10, 2), (1, 3, 3), (1, 1, 1)])
def test_batch_size_counts_tiles(many_tiles, images, entering, monkeypatch, tiles, batch_size, at_once):
    monkeypatch.setattr("foodextract.inference.extractor.MAX_NEW_TOKENS", 30)
    extractor = Extractor.from_pretrained(many_tiles, "cpu", tiles=tiles)
    assert extractor.dialect  # its probe is no batch
    seen = entering(extractor)
    together = list(extractor.extract_many(images, batch_size))
    assert max(rows for rows, _ in seen) == at_once
    assert all(rows * columns <= max(batch_size, tiles) for rows, columns in seen)
    assert sum(rows for rows, _ in seen) == len(images)
    seen.clear()
    read = [extractor.prepare_image(image) for image in images]
    assert [record for record, _ in extractor.extract_prepared(read, batch_size=batch_size)] == together
    assert max(rows for rows, _ in seen) == at_once
    assert all(rows * columns <= max(batch_size, tiles) for rows, columns in seen)


def test_unwanted_image_of_several_batches_is_the_right_one(many_tiles, images):
    extractor = Extractor.from_pretrained(many_tiles, "cpu", tiles=5)
    read = [extractor.prepare_image(image) for image in images]
    whole = extractor.extract_prepared(read, batch_size=10)
    gone = next(number for number, (record, _) in enumerate(whole) if record.image_title)
    left = extractor.extract_prepared(read, lambda number: number != gone, 10)
    assert left[gone][0].image_title == ""
    assert [record for record, _ in left[:gone] + left[gone + 1 :]] == [
        record for record, _ in whole[:gone] + whole[gone + 1 :]
    ]


@pytest.mark.parametrize(("batch", "at_once"), [(8, 1), (10, 2)])
def test_server_queue_counts_tiles(many_tiles, images, entering, monkeypatch, batch, at_once):
    monkeypatch.setattr("foodextract.inference.extractor.MAX_NEW_TOKENS", 30)
    extractor = Extractor.from_pretrained(many_tiles, "cpu", tiles=5)
    seen = entering(extractor)

    async def story():
        queue = Queue(lambda: extractor, QueueLimits(batch_size=batch, max_wait=0.5), ServerMetrics())
        async with queue.running():
            while queue.unavailable:
                await asyncio.sleep(0.005)
            assert queue._prepared._value == (1 + PREPARED) * at_once
            return await asyncio.gather(*map(queue.answer, images[:3]))

    answered = asyncio.run(asyncio.wait_for(story(), 60))
    assert max(rows for rows, _ in seen) == at_once
    assert [one.record for one in answered] == list(extractor.extract_many(images[:3]))


def test_many_tiles_are_warned_about_unless_requested(many_tiles, caplog):
    Extractor.from_pretrained(many_tiles, "cpu")
    [warning] = [record.message for record in caplog.records if record.name == "foodextract"]
    tokens = loading.load_processor(many_tiles).image_seq_len
    assert f"up to 17 tiles ({17 * tokens:,} image tokens" in warning
    assert "--tiles 1" in warning
    caplog.clear()
    for folder, tiles in ((many_tiles, 1), (many_tiles, 17), (loading.TINY_TUNED, None)):
        Extractor.from_pretrained(folder, "cpu", tiles=tiles)
    assert not caplog.records


@pytest.mark.slow
def test_command_warns_on_stderr(many_tiles, images, tmp_path):
    images[-1].save(tmp_path / "a.png")
    command = [sys.executable, "-m", "foodextract", "extract", "a.png", "--model", str(many_tiles)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stderr.count("up to 17 tiles") == 1
    assert json.loads(run.stdout)["file"] == "a.png"


def test_one_tile_gives_the_answers_of_the_one_tile_model(many_tiles, images, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(images):
        image.save(f"{number}.png")
    result = CliRunner().invoke(app, ["extract", ".", "--model", str(many_tiles), "--tiles", "1"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [{key: line[key] for key in line if key != "file"} for line in lines] == [
        tuned.extract(image).model_dump() for image in images
    ]
    refused = CliRunner().invoke(app, ["extract", ".", "--model", str(many_tiles), "--tiles", "3"])
    assert refused.exit_code == 2
    assert "choose one of 1, 5, 17" in refused.stderr


def test_fixed_image_budget_refuses_another(many_tiles, tmp_path, monkeypatch):
    monkeypatch.setattr("foodextract.inference.extractor.is_exported", lambda folder: True)
    monkeypatch.setattr("foodextract.inference.extractor.GraphModel", lambda *_: None)
    with pytest.raises(ModelError, match=r"exported for 17 tiles an image, not 1: .*export onnx --tiles 1"):
        Extractor.from_pretrained(many_tiles, tiles=1)
    assert Extractor.from_pretrained(many_tiles, tiles=17).tiles == Extractor.from_pretrained(many_tiles).tiles == 17
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ModelError, match="takes an image whole"):
        blip.load(tmp_path, "cpu", tiles=5)


def test_serve_command_passes_tiles(many_tiles, monkeypatch):
    loaded = []
    monkeypatch.setattr(server, "run", lambda load, *_: loaded.append(load()))
    for tiles in (1, 5):
        assert CliRunner().invoke(app, ["serve", "--model", str(many_tiles), "--tiles", str(tiles)]).exit_code == 0
    assert [extractor.tiles for extractor in loaded] == [1, 5]

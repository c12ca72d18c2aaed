"""Both notebooks, top to bottom, small: as `make demo` runs them, and on a stranger's folder of pictures."""

import json
import shutil
from pathlib import Path

import papermill
import pytest

from foodextract import models
from foodextract.results import read_results

ROOT = Path(__file__).parents[1]
ZERO, ONE = "00_create_vlm_dataset.ipynb", "01_fine_tune_vlm_v3_smolVLM_500m.ipynb"
SMALL = {"stage1": {"epochs": 1}, "stage2": {"epochs": 1}, "eval_batch": 8}

pytestmark = pytest.mark.notebooks


def run(name, where, /, **parameters):
    papermill.execute_notebook(ROOT / name, where / name, parameters=parameters, cwd=where, progress_bar=False, kernel_name="python3")


def test_the_offline_story(tmp_path, monkeypatch):
    monkeypatch.setenv("FOODEXTRACT_PROFILE", "offline")
    run(ZERO, tmp_path, train_scenes=64, test_scenes=16)
    run(ONE, tmp_path, **SMALL)
    rows = read_results(tmp_path / "results" / "offline.json")
    assert {row.subject for row in rows} >= {"base", "stage1", "stage2"}
    assert {row.n for row in rows if row.metric == "strict_json_rate"} == {16}
    moved = {row.subject: row.value for row in rows if row.metric == "weights_moved_share"}
    assert moved["stage1 vision_model"] == 0
    assert moved["stage2 vision_model"] > 0.9
    assert models.newest_tuned(tmp_path / "outputs") == tmp_path / "outputs" / "offline" / "stage2"


def test_any_checkpoint_on_any_labelled_folder(tmp_path, drawn):
    """Every place a parameter, none of them a default."""
    pictures, checkpoint = tmp_path / "pictures", tmp_path / "checkpoint"
    shutil.copytree(drawn / "train", pictures)
    (pictures / "broken.jpg").write_bytes(b"")
    nothing = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}
    with (pictures / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": "broken.jpg", **nothing}) + "\n{no json\n")
    shutil.copytree(models.TINY_TUNED, checkpoint)
    run(ZERO, tmp_path, profile="offline", source="folder", folder=str(pictures), output="built", seed=3)
    report = json.loads((tmp_path / "built" / "report.json").read_text())
    assert (report["kept"], report["rejected"]) == (40, 2)
    places = {"base_model": str(checkpoint), "dataset": "built", "output": "tuned", "results": "figures.json"}
    run(ONE, tmp_path, profile="offline", seed=3, eval_pictures=4, **places, **SMALL)
    assert (tmp_path / "tuned" / "stage2" / "model.safetensors").is_file()
    assert {row.n for row in read_results(tmp_path / "figures.json") if row.metric == "strict_json_rate"} == {4}

"""Both notebooks from top to bottom with small parameters: as `make demo` runs them, and on a folder of images."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
import yaml

from foodextract.evaluation.results import read_results
from foodextract.models import loading
from foodextract.training import checkpoints

ROOT = Path(__file__).parents[1]
ZERO, ONE = "00_create_vlm_dataset.ipynb", "01_fine_tune_vlm_v3_smolVLM_500m.ipynb"
SMALL = {"stage1": {"num_train_epochs": 1}, "stage2": {"num_train_epochs": 1}, "eval_batch": 8}

pytestmark = pytest.mark.timeout(1800)


def run(name, where, /, **parameters):
    papermill.execute_notebook(
        ROOT / name, where / name, parameters=parameters, cwd=where, progress_bar=False, kernel_name="python3"
    )


def test_the_offline_story(tmp_path, monkeypatch):
    monkeypatch.setenv("FOODEXTRACT_PROFILE", "offline")
    run(ZERO, tmp_path, train_scenes=64, test_scenes=16)
    trial = json.loads((tmp_path / "outputs" / "offline" / "corrupted" / "report.json").read_text())
    assert trial["near_duplicate_groups"] >= 50
    assert len(trial["issues"]) >= 8
    run(ONE, tmp_path, **SMALL)
    rows = read_results(tmp_path / "results" / "offline.json")
    assert {row.subject for row in rows} >= {"base", "stage1", "stage2"}
    assert {row.n for row in rows if row.metric == "strict_json_rate"} == {16}
    moved = {row.subject: row.value for row in rows if row.metric == "weights_moved_share"}
    assert moved["stage1 vision_model"] == 0
    assert moved["stage2 vision_model"] > 0.9
    assert (
        loading.find_model(outputs=tmp_path / "outputs") == loading.PHOTO
    )  # what has seen drawings alone is no default


@pytest.mark.slow
def test_any_checkpoint_on_any_labeled_folder(tmp_path, drawn):
    """All paths are parameters, none the default."""
    images, checkpoint = tmp_path / "images", tmp_path / "checkpoint"
    shutil.copytree(drawn / "train", images)
    (images / "broken.jpg").write_bytes(b"")
    nothing = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}
    with (images / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": "broken.jpg", **nothing}) + "\n{no json\n")
    shutil.copytree(loading.TINY_TUNED, checkpoint)
    run(ZERO, tmp_path, profile="offline", source="folder", folder=str(images), output="built", seed=3)
    report = json.loads((tmp_path / "built" / "report.json").read_text())
    assert (report["kept"], report["rejected"]) == (40, 2)
    paths = {"base_model": str(checkpoint), "dataset": "built", "output": "tuned", "results": "figures.json"}
    run(ONE, tmp_path, profile="offline", seed=3, eval_images=4, **paths, **SMALL)
    assert (tmp_path / "tuned" / "stage2" / "model.safetensors").is_file()
    assert {row.n for row in read_results(tmp_path / "figures.json") if row.metric == "strict_json_rate"} == {4}


def printed(notebook):
    """Return everything that the cells of an executed notebook printed."""
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def kill_once(there, where, parameters):
    """Run notebook 01 in the folder `where` and kill its kernel with SIGKILL once `there` returns a file."""
    where.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "papermill",
        ROOT / ONE,
        where / ONE,
        "--cwd",
        where,
        "--no-progress-bar",
        "-y",
        yaml.dump(parameters),
    ]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not there():
            assert run.poll() is None, run.stderr.read()[-3000:]
            time.sleep(0.01)
    finally:
        for process in psutil.Process(run.pid).children(recursive=True) if run.poll() is None else ():  # the kernel
            process.kill()
        run.kill()
        run.wait()


@pytest.mark.slow
def test_the_notebook_killed_in_both_stages_resumes_on_another_machine(drawn, tmp_path):
    """Killed in stage 1 and run again in the same place; killed in stage 2 and run again where only `keep_in` is left."""
    kept = tmp_path / "drive" / "FoodExtract"
    kept.parent.mkdir()
    epochs = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # of 5 steps
    parameters = {
        "profile": "offline", "dataset": str(drawn), "stage1": epochs, "stage2": epochs, "eval_images": 4, "keep_in": str(kept),
    }  # fmt: skip
    for stage in ("stage1", "stage2"):
        kill_once(
            lambda stage=stage: checkpoints.last_checkpoint(kept / stage / "checkpoints"), tmp_path / "one", parameters
        )
    trained = (kept / "stage1" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "two").mkdir()
    run(ONE, tmp_path / "two", **parameters)
    said = printed(tmp_path / "two" / ONE)
    assert "stage1: already trained" in said
    assert "stage2: resumed from checkpoint-" in said
    assert "stage1: resumed" not in said
    assert (kept / "stage1" / "model.safetensors").stat().st_mtime_ns == trained
    for stage in ("stage1", "stage2"):
        finished = json.loads((kept / stage / loading.FINISHED).read_text())
        assert [entry["step"] for entry in finished["log"]] == list(range(1, 16))
        assert not (kept / stage / "checkpoints").exists()
    asked = [json.loads(line) for line in (kept / "answers" / "base.jsonl").read_text().splitlines()]
    assert [len(batch["answers"]) for batch in asked[1:]] == [4]  # asked once, on the first machine
    seconds = {
        row.subject: row.value
        for row in read_results(tmp_path / "two" / "results" / "offline.json")
        if row.metric == "seconds"
    }
    assert seconds["ask_base"] == pytest.approx(asked[1]["seconds"], abs=1e-5)

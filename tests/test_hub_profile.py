"""The profile `hub` as a Colab badge starts it, executed: both notebooks against a Hub on this machine, each on a
machine of its own.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import pyarrow.parquet as pq
import pytest

from foodextract.evaluation.results import read_results
from foodextract.names import HUB_BASE, HUB_DATASET
from foodextract.schema import FoodRecord
from hub_server import Repository, environment, running_hub
from original import BROKEN, DIRT, EXACT_COPY, SPECIAL, parquet, rows_of_the_original, save_base

ROOT = Path(__file__).parents[1]
ZERO, ONE = "00_create_vlm_dataset.ipynb", "01_fine_tune_vlm_v3_smolVLM_500m.ipynb"
IMAGES, MODEL, SPACE = "somebody/food-images", "somebody/food-500m", "somebody/food-demo"
QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@contextmanager
def executed(home):
    """Run 00, then 01 on another machine, and give the Hub, the home of both machines and what the cells printed."""
    base = home / "base"
    save_base(base)
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        model, data = Repository(False), Repository(False)
        model.commit({path.name: path.read_bytes() for path in base.iterdir()})
        data.commit(
            {"README.md": b"# Original\n", "data/train-00000-of-00001.parquet": parquet(rows_of_the_original())}
        )
        hub.repositories |= {("model", HUB_BASE): model, ("dataset", HUB_DATASET): data}
        patch.delenv("FOODEXTRACT_PROFILE", raising=False)
        printed = {}
        for name, parameters in (
            (ZERO, {"push_to_hub": IMAGES}),
            (
                ONE,
                {
                    "dataset": IMAGES,
                    "stage1": QUICK,
                    "stage2": QUICK,
                    "allow_cpu": True,
                    "push_to_hub": MODEL,
                    "push_space_to_hub": SPACE,
                },
            ),
        ):
            machine = home / name[:2]
            machine.mkdir()
            (machine / "demos").symlink_to(ROOT / "demos")
            for variable, value in {**environment(hub), "HF_HOME": str(machine / "cache")}.items():
                patch.setenv(variable, value)
            papermill.execute_notebook(
                ROOT / name,
                machine / name,
                parameters=parameters,
                cwd=machine,
                progress_bar=False,
                kernel_name="python3",
            )
            cells = nbformat.read(machine / name, as_version=4).cells
            printed[name] = "\n".join(
                output.get("text", "") for cell in cells if cell.cell_type == "code" for output in cell.outputs
            )
        yield hub, home, printed


def test_both_notebooks_on_the_profile_hub(tmp_path):
    """One test, so that the notebooks run once."""
    with executed(tmp_path) as story:
        every_fault_of_the_original_is_noticed(story)
        notebook_00_says_what_to_paste_into_01(story)
        what_00_published_arrives_with_its_splits(story)
        the_base_is_asked_in_one_tile_and_trained_in_fp32_from_bf16(story)
        cards_say_what_is_true_of_this_profile(story)
        the_published_model_answers_through_a_pipeline_and_in_the_space(story)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "outputs" / "hub" / "dataset" / name).read_text().splitlines()]


def every_fault_of_the_original_is_noticed(story):
    _, home, _ = story
    found = {(issue["name"].split("-")[0], issue["rule"]) for issue in lines(home / "00", "issues.jsonl")}
    rejects = {reject["name"].split("-")[0]: reject["reason"] for reject in lines(home / "00", "rejects.jsonl")}
    for number in DIRT:
        name = f"{number:06d}"
        assert name in rejects or [rule for which, rule in found if which == name], number
    assert "is_food" in rejects["000001"]  # null says neither
    assert ("000002", "type") in found
    assert ("000003", "type") in found
    assert "000004" in rejects
    assert any(
        f"{number:06d}" in rejects and "duplicate" in rejects[f"{number:06d}"]
        for number in (EXACT_COPY, EXACT_COPY - 1)
    )
    assert f"{BROKEN:06d}" in rejects
    kept = {
        row["name"].split("-")[0]: row
        for split in ("train", "test")
        for row in pq.read_table(home / "00/outputs/hub/dataset" / split / "metadata.parquet").to_pylist()
    }
    assert kept["000003"]["food_items"] == ["soup", "bread"]
    assert kept["000002"]["is_food"] == 1  # "false" beside soup: the items win, with a finding
    assert ("000002", "contradiction") in found


def notebook_00_says_what_to_paste_into_01(story):
    assert f'dataset = "{IMAGES}"' in story[2][ZERO]


def what_00_published_arrives_with_its_splits(story):
    hub, home, printed = story
    report = json.loads((home / "00" / "outputs" / "hub" / "dataset" / "report.json").read_text())
    assert f"{report['train']:,} training images, {report['test']:,} held out" in printed[ONE]
    script = f"import datasets; rows = datasets.load_dataset({IMAGES!r}); rows['test'][0]['image']; print(len(rows['train']), len(rows['test']))"
    assert in_a_new_process(hub, home, script).split() == [str(report["train"]), str(report["test"])]


def the_base_is_asked_in_one_tile_and_trained_in_fp32_from_bf16(story):
    _, home, printed = story
    stage1 = json.loads((home / "01" / "outputs" / "hub" / "stage1" / "training.json").read_text())
    moved = {row["module"]: row["weights_moved"] for row in stage1["moved"]}
    assert moved["vision_model"] == 0
    assert moved["text_model"] > 0
    processor = json.loads((home / "01" / "outputs" / "hub" / "stage2" / "processor_config.json").read_text())[
        "image_processor"
    ]
    assert (processor["do_image_splitting"], processor["size"]) == (False, {"longest_edge": 512})
    assert "disk: training needs up to" in printed[ONE]
    tokens = json.loads((home / "01" / "outputs" / "hub" / "stage2" / "tokenizer.json").read_text())["added_tokens"]
    assert {token["id"]: token["content"] for token in tokens}.items() >= SPECIAL.items()
    rows = read_results(home / "01" / "results" / "hub.json")
    assert {row.value for row in rows if (row.subject, row.metric) == ("stage2 constrained", "strict_json_rate")} == {1}


def cards_say_what_is_true_of_this_profile(story):
    hub = story[0]
    card = hub.files("model", MODEL)["README.md"].decode()
    assert f"base_model: {HUB_BASE}" in card
    assert f"- {IMAGES}" in card
    assert "split: test" in card  # the published data set has one
    assert "stored in fp32" in " ".join(card.split())
    data = hub.files("dataset", IMAGES)["README.md"].decode()
    assert "split by foodextract with seed 42" in " ".join(data.split())
    assert HUB_DATASET in data


def the_published_model_answers_through_a_pipeline_and_in_the_space(story):
    hub, home, printed = story
    assert printed[ONE].count("The downloaded ") >= 2  # model and Space
    script = f"""
from transformers import pipeline
from PIL import Image
from foodextract.prompts import conversation
messages = conversation()
messages[1]["content"][0]["image"] = Image.new("RGB", (80, 60), "white")
pipe = pipeline("image-text-to-text", model={MODEL!r})
print(len(pipe(text=messages, max_new_tokens=8, return_full_text=False)), pipe.model.dtype)
"""
    assert in_a_new_process(hub, home, script).split() == ["1", "torch.float32"]
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "demos" / "FoodExtract-Vision")!r})
from PIL import Image
Image.new("RGB", (80, 60), "white").save("white.png")
import app, predict
print(app.extract("white.png"))
budgets = [model.processor.image_processor.size["longest_edge"] for model in (predict.TUNED, predict.UNTUNED)]
print(budgets, predict.BASE)
"""
    record, output = in_a_new_process(hub, home, script, FOODEXTRACT_MODEL=MODEL).strip().splitlines()[-2:]
    FoodRecord.parse(record)
    assert output == f"[512, 512] {HUB_BASE}"


def in_a_new_process(hub, home: Path, script: str, **more: str) -> str:
    """What a script prints on yet another machine, which knows the Hub's ids and no folder."""
    cache = home / "elsewhere"
    cache.mkdir(exist_ok=True)
    variables = {**os.environ, **environment(hub), "HF_HOME": str(cache), "PYTHONPATH": str(ROOT / "src"), **more}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cache, env=variables, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

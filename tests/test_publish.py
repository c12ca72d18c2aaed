"""Model, data set and Space, sent to a Hub on this machine by the official client and fetched again; and what happens when it fails."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

from foodextract import cards, evidence, profiles, prompts, publish, scenes
from foodextract import dataset as pictures
from foodextract.__main__ import app
from foodextract.models import TINY_TUNED
from foodextract.publish import Plan, PublishError
from foodextract.schema import FoodRecord
from foodextract.tables import NAMES
from hub_server import LARGE, TOKEN, Fault, environment, running_hub

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "demos" / "FoodExtract-Vision"
MODEL = "somebody/FoodExtract-tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, and a client that does not wait between its attempts."""
    http = sys.modules["huggingface_hub.utils._http"]
    monkeypatch.setattr(http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as server:
        yield server


def send(plan, hub, **options):
    return publish.publish(plan, endpoint=hub.url, **{"token": TOKEN, **options})


def content(plan):
    return {name: what if isinstance(what, bytes) else what.read_bytes() for name, what in plan.files.items()}


@pytest.fixture
def model_folder(tmp_path):
    return Path(shutil.copytree(TINY_TUNED, tmp_path / "tuned"))


@pytest.fixture
def built(drawn, tmp_path):
    """The drawn data set with its card, as notebook 00 leaves it."""
    folder = Path(shutil.copytree(drawn, tmp_path / "dataset"))
    report = json.loads((folder / "report.json").read_text())
    (folder / "README.md").write_text(str(cards.dataset_card(report, "drawn", 42, "abc")))
    return folder


# --------------------------------------------------------------------------------------------------------------------------- what may go


def test_only_what_is_allowed_by_name(model_folder):
    expected = {path.name for path in model_folder.iterdir()} | {"README.md", "training.json"}
    (model_folder / "training.json").write_text("{}")
    for secret in (
        "checkpoints/checkpoint-3/optimizer.pt", "checkpoints/checkpoint-3/model.safetensors", "optimizer.safetensors", "rng_state.pth",
        ".cache/huggingface/token", "token", ".env", "training_args.bin", "events.out.tfevents", "notes.json", "model.safetensors.partial",
    ):  # fmt: skip
        (model_folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (model_folder / secret).write_text("secret")
    (model_folder / "vocab.json").symlink_to("/etc/hostname")
    assert set(publish.model_plan(model_folder, MODEL).files) == expected


def test_no_figures_no_publishing(model_folder):
    (model_folder / evidence.EVALUATION).unlink()
    with pytest.raises(PublishError, match=r"has no evaluation.json.*notebook 01"):
        publish.model_plan(model_folder)


def test_figures_of_other_weights_do_not_count(model_folder):
    weights = bytearray((model_folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (model_folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(PublishError, match="is about the weights"):
        publish.model_plan(model_folder)


def test_figures_of_the_base_alone_do_not_count(model_folder):
    found = evidence.verified(model_folder)
    stages = [profiles.PROFILES["offline"].stage1]
    evidence.write(model_folder, "a/b", "scenes", stages, [row for row in found.rows if row.subject == "base"])
    with pytest.raises(PublishError, match="no figures of these weights"):
        publish.model_plan(model_folder)


@pytest.mark.parametrize("plan", [publish.model_plan, lambda folder: publish.dataset_plan(folder, "a/b"), publish.space_plan])
def test_a_folder_without_anything_is_refused(plan, tmp_path):
    with pytest.raises(PublishError, match=re.escape(str(tmp_path))):
        plan(tmp_path)


def test_dry_run_lists_every_file_and_sends_nothing(hub, model_folder):
    result = CliRunner().invoke(app, ["publish", "model", str(model_folder), "--to", MODEL, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", result.stdout, re.MULTILINE)}
    assert listed == {name: len(data) for name, data in content(publish.model_plan(model_folder, MODEL)).items()}
    assert hub.requests == []


def test_the_space_carries_this_very_package():
    tracked = subprocess.run(["git", "ls-files", "src/foodextract"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sent = content(publish.space_plan(SPACE))
    assert {f"foodextract/{name.removeprefix('src/foodextract/')}" for name in tracked} <= set(sent)
    for name, data in sent.items():
        if name.startswith("foodextract/"):
            assert data == (ROOT / "src" / name).read_bytes(), name
    assert {name.partition("/")[0] for name in sent} == {
        "README.md", "LICENSE", "NOTICE", "app.py", "asking.py", "limits.py", "requirements.txt", "thumbnail.png", "foodextract",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------- there and back


def test_model_round_trip(hub, model_folder, capfd):
    plan = publish.model_plan(model_folder, MODEL)
    said = send(plan, hub)
    assert hub.files("model", MODEL) == content(plan)
    assert hub.repositories["model", MODEL].private
    assert FoodRecord.parse(said.partition("it answers ")[2])
    assert send(plan, hub).startswith("published as")
    assert len(hub.repositories["model", MODEL].commits) == 2, "the same again is no new commit"
    assert TOKEN not in said + str(plan) + "".join(capfd.readouterr())


def test_dataset_round_trip(hub, built, tmp_path):
    plan = publish.dataset_plan(built, "somebody/pictures")
    said = send(plan, hub)
    assert hub.files("dataset", "somebody/pictures") == content(plan)
    assert "40 train and 16 test rows" in said
    folder = huggingface_hub.snapshot_download(
        "somebody/pictures", repo_type="dataset", endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "fetched"
    )
    fetched, sent = datasets.load_dataset(folder, cache_dir=str(tmp_path / "cache")), pictures.load(built)
    for split in ("train", "test"):
        for theirs, ours in zip(fetched[split], sent[split], strict=True):
            assert theirs["image"].tobytes() == ours["image"].tobytes()
            assert {k: v for k, v in theirs.items() if k != "image"} == {k: v for k, v in ours.items() if k != "image"}


def test_space_round_trip_by_command(hub, model_folder, tmp_path):
    """The command in its own process, sent here by HF_ENDPOINT; the Space that comes back fetches its model here too, and answers."""
    send(publish.model_plan(model_folder, MODEL), hub)
    env = {**os.environ, **environment(hub), "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "foodextract", "publish", "space", "--to", "somebody/space", "--model", MODEL]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert FoodRecord.parse(run.stdout.strip().partition("its app answers ")[2])
    repository = hub.repositories["space", "somebody/space"]
    assert (repository.private, repository.sdk, repository.variables) == (True, "gradio", {"FOODEXTRACT_MODEL": MODEL})
    assert hub.files("space", "somebody/space") == content(publish.space_plan(SPACE, "somebody/space", MODEL))
    front = yaml.safe_load(hub.files("space", "somebody/space")["README.md"].split(b"---")[1])
    assert MODEL in front["models"]
    assert "/spaces/somebody/space/" in front["thumbnail"]
    assert TOKEN not in run.stdout + run.stderr


def test_what_is_no_longer_wanted_goes_and_what_is_not_ours_stays(hub, model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    send(plan, hub)
    repository = hub.repositories["model", MODEL]
    repository.commit({**repository.commits[-1][1], "model-00001-of-00002.safetensors": b"old", "quantised.gguf": b"theirs"})
    send(plan, hub)
    assert hub.files("model", MODEL) == {**content(plan), "quantised.gguf": b"theirs"}


def test_private_things_do_not_go_where_everybody_reads(hub, model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    assert "(public)" in send(plan, hub, public=True)
    before = hub.files("model", MODEL)
    changed = replace(plan, files={**plan.files, "training.json": b"{}"})
    with pytest.raises(PublishError, match="--public"):
        send(changed, hub)
    assert hub.files("model", MODEL) == before


# ------------------------------------------------------------------------------------------------------------------------------- faults

FAULTS = [
    (Fault("GET", "whoami", 401), "hf auth login"),
    (Fault("POST", "/commit/", 401), "hf auth login"),
    (Fault("POST", "/commit/", 403), "may not write there"),
    (Fault("POST", "/commit/", 409), "somebody else is changing it"),
    (Fault("POST", "/preupload/", 429, headers={"Retry-After": "60"}), "asks for a pause"),
    (Fault("POST", "/commit/", 500), "has a fault .HTTP 500.: run this again later"),
    (Fault("PUT", "/lfs/", 500), "has a fault .HTTP 500.: run this again later"),
    (Fault("PUT", "/lfs/", 0), "the connection broke"),
    (Fault("GET", "/resolve/", 500), "has a fault|the connection broke"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=lambda v: f"{v.path}{v.status}" if isinstance(v, Fault) else "")
def test_a_fault_is_explained_and_loses_nothing(hub, model_folder, fault, message):
    plan = publish.model_plan(model_folder, MODEL)
    old = Plan("model", MODEL, {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}"})
    repository_before = _put(hub, old)
    hub.faults = [replace(fault)]
    with pytest.raises(PublishError, match=message) as caught:
        send(plan, hub)
    assert MODEL in str(caught.value)
    assert TOKEN not in str(caught.value)
    if "/resolve/" not in fault.path:
        assert hub.files("model", MODEL) == repository_before, "readers still see what was there"
    hub.faults = []
    send(plan, hub)
    assert hub.files("model", MODEL) == content(plan)


def test_an_owner_that_the_token_may_not_write_for(hub, model_folder):
    hub.faults = [Fault("POST", "repos/create", 403)]
    with pytest.raises(PublishError, match="may not write there"):
        send(publish.model_plan(model_folder, MODEL), hub)
    assert hub.repositories == {}


def _put(hub, plan):
    """A repository with an older state."""
    huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN).create_repo(plan.repo_id, repo_type=plan.kind, private=True)
    hub.repositories[plan.kind, plan.repo_id].commit({".gitattributes": b"", **plan.files})
    return dict(plan.files)


def test_an_interrupted_upload_goes_on_where_it_was(hub, model_folder):
    (model_folder / "merges.txt").write_text("x" * 100_000)
    plan = publish.model_plan(model_folder, MODEL)
    large = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", large, 0)]
    with pytest.raises(PublishError, match="is not sent again"):
        send(plan, hub)
    arrived = hub.asked("PUT", "/lfs/") - hub.asked("PUT", large)
    assert arrived == sum(size > LARGE for size in plan.sizes().values()) - 1, "the other large files"
    hub.faults, hub.requests = [], []
    send(plan, hub)
    assert hub.asked("PUT", "/lfs/") == hub.asked("PUT", large) == 1
    assert hub.files("model", MODEL) == content(plan)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/lfs/", 500, times=2),
        Fault("PUT", "/lfs/", 0, times=1),
        Fault("POST", "/preupload/", 429, times=1, headers={"Retry-After": "30"}),
        Fault("POST", "/commit/", seconds=1, times=1),
        Fault("GET", "/resolve/.*model.safetensors", 0, times=1),
    ],
    ids=lambda fault: f"{fault.path}{fault.status}",
)
def test_a_passing_fault_is_not_noticed(hub, model_folder, fault):
    plan = publish.model_plan(model_folder, MODEL)
    hub.faults = [replace(fault)]
    send(plan, hub)
    assert hub.faults[0].times == 0
    assert hub.files("model", MODEL) == content(plan)


def test_a_change_by_somebody_else_is_not_overwritten(hub, model_folder, monkeypatch):
    plan = publish.model_plan(model_folder, MODEL)
    send(plan, hub)
    repository = hub.repositories["model", MODEL]
    listed = huggingface_hub.HfApi.list_repo_files

    def meanwhile(self, *args, **kwargs):
        repository.commit({**repository.commits[-1][1], "README.md": b"theirs"})
        return listed(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", meanwhile)
    with pytest.raises(PublishError, match="in the meantime"):
        send(replace(plan, files={**plan.files, "training.json": b"{}"}), hub)
    assert hub.files("model", MODEL)["README.md"] == b"theirs"


def test_without_a_token_it_says_how_to_log_in(hub, model_folder):
    with pytest.raises(PublishError, match="hf auth login"):
        send(publish.model_plan(model_folder, MODEL), hub, token=None)
    with pytest.raises(PublishError, match="hf auth login"):
        send(publish.model_plan(model_folder, MODEL), hub, token="hf_other")


def test_offline_and_out_of_reach_are_told_apart(hub, model_folder, monkeypatch):
    plan = publish.model_plan(model_folder, MODEL)
    with pytest.raises(PublishError, match="the connection broke"):
        publish.publish(plan, endpoint="http://127.0.0.1:9", token=TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        send(plan, hub)


# -------------------------------------------------------------------------------------------------------------------------------- cards


def test_model_card_says_what_was_measured(model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    card = huggingface_hub.ModelCard(plan.files["README.md"].decode())
    rows = {row.metric: row for row in evidence.verified(model_folder).own}
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0"
    assert card.data.metrics == ["accuracy", "f1"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        metric: rows[metric].value for metric in NAMES.keys() & rows.keys()
    }
    rate = str(profiles.PROFILES["offline"].stage1.learning_rate)
    for part in (prompts.SYSTEM, prompts.USER, evidence.verified(model_folder).weights, "one tile of 192 x 192", rate, "@software"):
        assert part in card.content


def test_model_card_of_a_hub_model_names_base_and_data(model_folder):
    found = replace(evidence.verified(model_folder), base_model="HuggingFaceTB/base", dataset="somebody/pictures")
    processor = json.loads((model_folder / "processor_config.json").read_text())
    processor["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 768}}
    card = cards.model_card(found, processor, MODEL, publish.CODE)
    assert (card.data.base_model, card.data.datasets) == ("HuggingFaceTB/base", ["somebody/pictures"])
    assert "up to 17 tiles" in card.content


def test_the_card_s_examples_run(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenes.draw_scene(7, "test", 0).image.save("lunch.jpg")
    card = publish.model_plan(model_folder, MODEL).files["README.md"].decode()
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example.replace(f'"{MODEL}"', repr(str(model_folder))), {})
    ours, theirs = capsys.readouterr().out.strip().splitlines()[-2:]
    assert FoodRecord.parse(ours) == FoodRecord.parse(theirs.strip())


def test_the_notebook_s_publishing_cells_work(hub, built, model_folder, tmp_path, capsys, monkeypatch):
    """The last cells but one of both notebooks, as they stand, with the names that earlier cells leave behind."""
    send = publish.publish
    monkeypatch.setattr(publish, "publish", lambda plan, **how: send(plan, endpoint=hub.url, token=TOKEN, **how))
    for name, value in environment(hub).items():  # for the app of the Space
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    settings = profiles.PROFILES["offline"]
    stages = [settings.stage1, settings.stage2]
    rows = evidence.verified(model_folder).rows
    (tmp_path / "out").mkdir()
    shutil.move(model_folder, tmp_path / "out" / "stage2")
    known = {"output": tmp_path / "out", "base_model": "a/b", "dataset": None, "settings": settings, "stages": stages, "figures": rows}
    for name, extra in {
        "01_fine_tune_vlm_v3_smolVLM_500m.ipynb": known | {"push_to_hub": "somebody/one", "push_space_to_hub": "somebody/two"},
        "00_create_vlm_dataset.ipynb": {"output": built, "push_to_hub": "somebody/zero", "publish": publish},
    }.items():
        cells = json.loads((ROOT / name).read_text())["cells"]
        exec("".join(cells[-2]["source"]), {"os": os, **extra})
    told = capsys.readouterr().out
    assert "published as somebody/one" in told
    assert FoodRecord.parse(told.partition("its app answers ")[2].splitlines()[0])
    assert hub.repositories["space", "somebody/two"].variables == {"FOODEXTRACT_MODEL": "somebody/one"}
    assert hub.files("dataset", "somebody/zero").keys() >= {"README.md", "data/test-00000-of-00001.parquet"}
    assert json.loads(hub.files("model", "somebody/one")["evaluation.json"])["base_model"] == "a/b"

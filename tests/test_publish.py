"""Model, dataset and Space, published to a local Hub by the official client and downloaded again, with faults."""

import errno
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import termios
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

from foodextract import names, prompts
from foodextract.__main__ import app
from foodextract.data import dataset as images
from foodextract.data import scenes
from foodextract.evaluation import provenance
from foodextract.hub import client as hub_client
from foodextract.hub import publish
from foodextract.hub.publish import Plan, PublishError
from foodextract.models.loading import TINY_TUNED
from foodextract.names import HUB_BASE
from foodextract.reporting import cards
from foodextract.reporting.tables import NAMES
from foodextract.schema import FoodRecord
from foodextract.training import config as presets
from hub_server import LARGE, TOKEN, Fault, Repository, environment, running_hub

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "demos" / "FoodExtract-Vision"
MODEL = "somebody/FoodExtract-tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub, and a client that does not wait between its attempts."""
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


def answer_in(said):
    return re.search(r"^  answer   (.*)$", said, re.MULTILINE)[1].strip()


def space_plan(repo_id="somebody/space", model=MODEL):
    """Plan the Space without its package, for speed."""
    plan = publish.space_plan(SPACE, repo_id, model)
    return replace(plan, files={name: what for name, what in plan.files.items() if not name.startswith("foodextract/")})


@pytest.fixture
def unverified(monkeypatch):
    """Skip verification, for tests that end earlier."""
    monkeypatch.setattr(publish, "_verify", lambda plan, folder: "")


def content(plan):
    return {name: what if isinstance(what, bytes) else what.read_bytes() for name, what in plan.files.items()}


@pytest.fixture
def model_folder(tmp_path):
    return Path(shutil.copytree(TINY_TUNED, tmp_path / "tuned"))


@pytest.fixture
def built(drawn, tmp_path):
    """The drawn dataset with its card, as notebook 00 writes it."""
    folder = Path(shutil.copytree(drawn, tmp_path / "dataset"))
    report = json.loads((folder / "report.json").read_text())
    (folder / "README.md").write_text(str(cards.dataset_card(report, "drawn", 42, "abc")))
    return folder


def test_only_files_allowed_by_name_are_planned(model_folder):
    expected = {path.name for path in model_folder.iterdir()} | {"README.md", "training.json"}
    (model_folder / "training.json").write_text("{}")
    for secret in (
        "checkpoints/checkpoint-3/optimizer.pt", "checkpoints/checkpoint-3/model.safetensors",
        "optimizer.safetensors", "rng_state.pth", ".cache/huggingface/token", "token", ".env", "training_args.bin",
        "events.out.tfevents", "notes.json", "model.safetensors.partial",
    ):  # fmt: skip
        (model_folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (model_folder / secret).write_text("secret")
    (model_folder / "vocab.json").symlink_to("/etc/hostname")
    assert set(publish.model_plan(model_folder, MODEL).files) == expected


def test_a_model_without_evaluation_is_refused(model_folder):
    (model_folder / provenance.Provenance.FILE).unlink()
    with pytest.raises(PublishError, match=r"has no evaluation.json.*notebook 01"):
        publish.model_plan(model_folder)


def test_an_evaluation_of_other_weights_is_refused(model_folder):
    weights = bytearray((model_folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (model_folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(PublishError, match="is about the weights"):
        publish.model_plan(model_folder)


def test_an_evaluation_of_the_base_alone_is_refused(model_folder):
    found = provenance.verified(model_folder)
    stages = [presets.PROFILES["offline"].stage1]
    provenance.write(model_folder, "a/b", "scenes", stages, [row for row in found.rows if row.subject == "base"])
    with pytest.raises(PublishError, match="no figures of these weights"):
        publish.model_plan(model_folder)


@pytest.mark.parametrize("given", ["folder", "./nowhere", "/data/nowhere", "a/b/nowhere"])
def test_local_paths_are_stripped(model_folder, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    given = str(model_folder) if given == "folder" else given
    found = provenance.verified(model_folder)
    provenance.write(model_folder, given, given, [presets.PROFILES["offline"].stage2], found.rows)
    sent = content(publish.model_plan(model_folder, MODEL))
    said = json.loads(sent["evaluation.json"])
    assert said["base_model"] == said["dataset"] == Path(given).name
    card = huggingface_hub.ModelCard(sent["README.md"].decode())
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert f"{given}" not in card.content
    assert f"datasets/{Path(given).name}" not in card.content


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance.name_of("outputs/mine") == "outputs/mine"
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    assert provenance.name_of("outputs/mine") == "mine"


def test_a_dataset_is_named_by_its_sources():
    said = {
        "source": ["food270", "mine", "scenes", "scenes"],
        "license": ["see somebody/images", "see below", "CC0", "CC0"],
    }
    rows = datasets.DatasetDict(train=datasets.Dataset.from_dict(said))
    assert provenance.origin(rows) == "scenes + somebody/images + mine"


def test_the_project_s_own_name_requires_its_own_base(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["publish", "model", str(model_folder), "--dry-run"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tiny-base" in result.stderr
    assert "--to owner/name" in result.stderr
    found = provenance.verified(model_folder)
    provenance.write(model_folder, HUB_BASE, found.dataset, [presets.PROFILES["offline"].stage2], found.rows)
    said = str(publish.model_plan(model_folder))
    assert said.startswith(f"model {names.HUB_MODEL} from {model_folder}, 2,8")
    assert "parameters in fp32:" in said


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("processor_config.json", lambda data: b"{broken"),
        ("processor_config.json", lambda data: b"{}"),
        ("processor_config.json", lambda data: b'{"image_processor": null}'),
        ("processor_config.json", None),
        ("model.safetensors", lambda data: data[:-1000]),
        ("model.safetensors", lambda data: b"no weights"),
        ("evaluation.json", lambda data: b"[]"),
    ],
)
def test_a_damaged_file_is_named(model_folder, name, damage):
    if damage:
        (model_folder / name).write_bytes(damage((model_folder / name).read_bytes()))
    else:
        (model_folder / name).unlink()
    with pytest.raises(PublishError, match=rf"{re.escape(str(model_folder / name))}.*(again|notebook 01)"):
        publish.model_plan(model_folder, MODEL)


def test_shards_need_their_index(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00001.safetensors")
    found = provenance.verified(TINY_TUNED)
    provenance.write(model_folder, found.base_model, found.dataset, [presets.PROFILES["offline"].stage2], found.rows)
    with pytest.raises(PublishError, match=r"index\.json is missing"):
        publish.model_plan(model_folder, MODEL)


def test_planning_a_dataset_does_not_change_it(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    plan = publish.dataset_plan(built, "somebody/images")
    assert 'load_dataset("somebody/images"' in plan.files["README.md"].decode()
    made = plan.files["data/test-00000-of-00001.parquet"].parent
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert made.is_dir()
    del plan
    gc.collect()
    assert not made.exists()
    assert not made.parent.exists()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("app.py", True),
        ("foodextract/old/module.txt", True),
        ("NOTICE", True),
        ("pages/x.py", False),
        ("image.png", False),
    ],
)
def test_files_of_ours_in_a_space(name, ours):
    assert publish._is_ours("space", name) == ours


def test_files_of_ours_in_a_dataset():
    assert publish._is_ours("dataset", "data/train-00000-of-00002.parquet")
    assert not publish._is_ours("dataset", "data/theirs/train.parquet")


@pytest.mark.parametrize(
    "plan", [publish.model_plan, lambda folder: publish.dataset_plan(folder, "a/b"), publish.space_plan]
)
def test_an_empty_folder_is_refused(plan, tmp_path):
    with pytest.raises(PublishError, match=re.escape(str(tmp_path))):
        plan(tmp_path)


def test_dry_run_lists_every_file_and_sends_nothing(hub, model_folder):
    result = CliRunner().invoke(app, ["publish", "model", str(model_folder), "--to", MODEL, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    listed = {
        name: int(size.replace(",", ""))
        for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", result.stdout, re.MULTILINE)
    }
    assert listed == {name: len(data) for name, data in content(publish.model_plan(model_folder, MODEL)).items()}
    assert hub.requests == []


def test_a_summary_has_one_line_a_folder():
    plan = Plan("space", "a/b", {"app.py": b"12", "data/x.txt": b"345", "data/more/y.txt": b"6"}, " from here")
    head, *lines, total = plan.summary().splitlines()
    assert head == "space a/b from here:"
    assert [line.split(maxsplit=1) for line in lines] == [["2", "app.py"], ["4", "data/ (2 files)"]]
    assert total.split() == ["6", "bytes", "in", "3", "files"]


def test_progress_bars_need_a_terminal(model_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")  # so that it is put back
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    CliRunner().invoke(app, ["publish", "model", str(model_folder), "--to", MODEL, "--dry-run"])
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_the_space_contains_this_package():
    tracked = subprocess.run(
        ["git", "ls-files", "src/foodextract"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    sent = content(publish.space_plan(SPACE))
    package = {
        f"foodextract/{name.removeprefix('src/foodextract/')}" for name in tracked if not name.endswith("README.md")
    }
    assert package <= set(sent)
    for name, data in sent.items():
        if name.startswith("foodextract/"):
            assert data == (ROOT / "src" / name).read_bytes(), name
    assert {name.partition("/")[0] for name in sent} == {
        "README.md", "LICENSE", "NOTICE", "app.py", "limits.py", "predict.py", "previews.py", "style.css",
        "requirements.txt", "thumbnail.png", "foodextract", "examples",
    }  # fmt: skip


def test_model_round_trip(hub, model_folder, capfd):
    plan = publish.model_plan(model_folder, MODEL)
    said = send(plan, hub)
    assert hub.files("model", MODEL) == content(plan)
    assert hub.repositories["model", MODEL].private
    assert FoodRecord.parse(answer_in(said)).food_items, "an empty answer proves little"
    assert re.search(r"^  label    \{.*\}\n.*\n  verdict  \d of \d items found, \d invented$", said, re.MULTILINE)
    assert send(plan, hub).startswith("published as")
    assert len(hub.repositories["model", MODEL].commits) == 2, "the same again is no new commit"
    assert TOKEN not in said + str(plan) + "".join(capfd.readouterr())


def test_dataset_round_trip(hub, built, tmp_path):
    plan = publish.dataset_plan(built, "somebody/images")
    said = send(plan, hub)
    assert hub.files("dataset", "somebody/images") == content(plan)
    assert "40 train and 16 test rows" in said
    folder = huggingface_hub.snapshot_download(
        "somebody/images", repo_type="dataset", endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "fetched"
    )
    fetched, sent = datasets.load_dataset(folder, cache_dir=str(tmp_path / "cache")), images.load(built)
    for split in ("train", "test"):
        for theirs, ours in zip(fetched[split], sent[split], strict=True):
            assert theirs["image"].tobytes() == ours["image"].tobytes()
            assert {k: v for k, v in theirs.items() if k != "image"} == {k: v for k, v in ours.items() if k != "image"}
    send(publish.dataset_plan(built, "somebody/images"), hub)
    assert len(hub.repositories["dataset", "somebody/images"].commits) == 2, "the same again is no new commit"
    used = re.search(r"```python\n(.*?)```", hub.files("dataset", "somebody/images")["README.md"].decode(), re.DOTALL)[
        1
    ]
    asked = f"{used}\nprint({{split: len(rows) for split, rows in load_dataset('somebody/images').items()}})"
    env = {**os.environ, **environment(hub), "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first = sent["test"][0]
    assert run.stdout.splitlines() == [
        f"{first['image'].size} {first['image_title']} {first['food_items']}", "{'train': 40, 'test': 16}"
    ]  # fmt: skip


@pytest.mark.slow
def test_space_round_trip_by_command(hub, model_folder, tmp_path):
    """Run the command in a terminal against the local Hub; the downloaded Space gets its model there, and answers."""
    send(publish.model_plan(model_folder, MODEL), hub)
    env = {**os.environ, **environment(hub), "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT / "src")}
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, "-m", "foodextract", "publish", "space", "--to", "somebody/space", "--model", MODEL]
    said, shown = in_terminal(command, cwd=ROOT, env=env)
    assert FoodRecord.parse(answer_in(said)).food_items, shown
    assert re.search(r"model\.safetensors: +100%", shown), "a bar for each large file"
    repository = hub.repositories["space", "somebody/space"]
    assert (repository.private, repository.sdk, repository.variables) == (True, "gradio", {"FOODEXTRACT_MODEL": MODEL})
    assert hub.files("space", "somebody/space") == content(publish.space_plan(SPACE, "somebody/space", MODEL))
    front = yaml.safe_load(hub.files("space", "somebody/space")["README.md"].split(b"---")[1])
    assert MODEL in front["models"]
    assert "/spaces/somebody/space/" in front["thumbnail"]
    assert TOKEN not in said + shown


def in_terminal(command, **options):
    """Run a command with a terminal as stderr; return its stdout and what the terminal shows."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    shown = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, **options) as run:
        os.close(theirs)
        with suppress(OSError):  # the terminal is closed
            while part := os.read(ours, 4096):
                shown += part
        os.close(ours)
        return run.stdout.read(), shown.decode(errors="replace")


def test_a_space_never_uses_the_wrong_model(hub, unverified):
    hub.repositories["model", MODEL] = hub.repositories["model", "somebody/new"] = Repository(
        private=True, commits=[("0" * 40, {})]
    )
    plan = space_plan()
    send(plan, hub)
    assert hub.repositories["space", "somebody/space"].variables == {"FOODEXTRACT_MODEL": MODEL}
    assert hub.count("POST", "/variables") == 0, "it was made with it"
    send(plan, hub)
    assert len(hub.repositories["space", "somebody/space"].commits) == 2, "the same again is no new commit"
    hub.requests, hub.faults = [], [Fault("POST", "/commit/", 500)]
    with pytest.raises(
        PublishError, match=r"Readers still see the previous version.* But it already uses somebody/new"
    ):
        send(space_plan(model="somebody/new"), hub)
    assert hub.repositories["space", "somebody/space"].variables == {"FOODEXTRACT_MODEL": "somebody/new"}


def test_a_space_without_a_published_model_is_refused(hub):
    with pytest.raises(PublishError, match=r"a Space cannot use \./outputs/mine: publish that model"):
        space_plan(model="./outputs/mine")
    with pytest.raises(PublishError, match="somebody/nothing: the Hub does not find it"):
        send(space_plan(model="somebody/nothing"), hub)
    assert hub.repositories == {}


def test_an_app_that_never_answers_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "APP_TIMEOUT", 0.5)
    (tmp_path / "app.py").write_text("import time; time.sleep(600)")
    with pytest.raises(PublishError, match=f"no answer within 0.5 s: try `make space` with FOODEXTRACT_MODEL={MODEL}"):
        publish._verify(Plan("space", "a/b", {}, model=MODEL), tmp_path)


def test_outdated_files_are_deleted_and_others_files_stay(hub, model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    send(plan, hub)
    repository = hub.repositories["model", MODEL]
    repository.commit(
        {**repository.commits[-1][1], "model-00001-of-00002.safetensors": b"old", "quantized.gguf": b"theirs"}
    )
    send(plan, hub)
    assert hub.files("model", MODEL) == {**content(plan), "quantized.gguf": b"theirs"}


def test_nothing_goes_to_a_public_repository_unasked(hub, model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    assert "(public)" in send(plan, hub, public=True)
    before = hub.files("model", MODEL)
    changed = replace(plan, files={**plan.files, "training.json": b"{}"})
    with pytest.raises(PublishError, match="is public: add --public"):
        send(changed, hub)
    assert hub.files("model", MODEL) == before


def test_a_private_repository_does_not_become_public(hub, model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    before = _put(hub, Plan("model", MODEL, {"README.md": b"x"}))
    with pytest.raises(PublishError, match=r"exists and is private.*in its settings on the Hub, or omit --public"):
        send(plan, hub, public=True)
    assert hub.repositories["model", MODEL].private
    assert hub.files("model", MODEL) == before


FAULTS = [
    (Fault("GET", "whoami", 401), "hf auth login"),
    (Fault("POST", "/commit/", 401), "hf auth login"),
    (Fault("POST", "/commit/", 403), "may not write there"),
    (Fault("POST", "/commit/", 409), "somebody else is changing it"),
    (Fault("POST", "/preupload/", 429, headers={"Retry-After": "60"}), "limits the rate"),
    (Fault("POST", "/commit/", 500), "fails .HTTP 500.: rerun the command later"),
    (Fault("PUT", "/lfs/", 500), "fails .HTTP 500.: rerun the command later"),
    (Fault("PUT", "/lfs/", 0), "the connection broke"),
    (
        Fault("POST", "/commit/", 400, says="a file name is too long"),
        r"refuses this .HTTP 400: a file name is too long.: fix",
    ),
    (Fault("POST", "/commit/", 422, says="the front matter"), r"refuses this .HTTP 422: the front matter.: fix"),
    (Fault("PUT", "/lfs/", 413, says="too large"), r"refuses this .HTTP 413: too large.: fix"),
    (Fault("GET", "/resolve/", 500), "fails .HTTP 500.*It is published, but not verified.*the same command"),
    (Fault("GET", "/resolve/", 0), "the connection broke.*It is published.*the same command"),
]


@pytest.mark.parametrize(
    ("fault", "message"), FAULTS, ids=lambda v: f"{v.path}{v.status}" if isinstance(v, Fault) else ""
)
def test_a_fault_is_explained_and_loses_nothing(hub, model_folder, fault, message):
    plan = publish.model_plan(model_folder, MODEL)
    old = Plan("model", MODEL, {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}"})
    repository_before = _put(hub, old)
    hub.faults = [replace(fault)]
    with pytest.raises(PublishError, match=message) as caught:
        send(plan, hub)
    assert MODEL in str(caught.value)
    assert TOKEN not in str(caught.value)
    published = "/resolve/" in fault.path
    assert hub.files("model", MODEL) == (content(plan) if published else repository_before)
    assert ("Readers still see the previous version" in str(caught.value)) != published
    hub.faults = []
    send(plan, hub)
    assert hub.files("model", MODEL) == content(plan)


@pytest.mark.parametrize(
    ("status", "message"), [(403, "may not write there"), (402, "refuses this .HTTP 402: buy more room.: fix")]
)
def test_a_token_without_write_permission(hub, model_folder, status, message):
    hub.faults = [Fault("POST", "repos/create", status, says="buy more room")]
    with pytest.raises(PublishError, match=message):
        send(publish.model_plan(model_folder, MODEL), hub)
    assert hub.repositories == {}


def _put(hub, plan):
    """Create a repository with an older state."""
    huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN).create_repo(plan.repo_id, repo_type=plan.kind, private=True)
    hub.repositories[plan.kind, plan.repo_id].commit({".gitattributes": b"", **plan.files})
    return dict(plan.files)


def test_an_interrupted_upload_resumes(hub, model_folder):
    (model_folder / "merges.txt").write_text("x" * 100_000)
    plan = publish.model_plan(model_folder, MODEL)
    large = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", large, 0)]
    with pytest.raises(PublishError, match="are not sent again"):
        send(plan, hub)
    arrived = hub.count("PUT", "/lfs/") - hub.count("PUT", large)
    assert arrived == sum(size > LARGE for size in plan.sizes().values()) - 1, "the other large files"
    hub.faults, hub.requests = [], []
    send(plan, hub)
    assert hub.count("PUT", "/lfs/") == hub.count("PUT", large) == 1
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
def test_a_passing_fault_is_retried(hub, model_folder, fault):
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


def test_a_missing_token_says_how_to_log_in(hub, model_folder):
    with pytest.raises(PublishError, match="hf auth login"):
        send(publish.model_plan(model_folder, MODEL), hub, token=None)
    with pytest.raises(PublishError, match="hf auth login"):
        send(publish.model_plan(model_folder, MODEL), hub, token="hf_other")


def test_offline_and_unreachable_have_different_messages(hub, model_folder, monkeypatch):
    plan = publish.model_plan(model_folder, MODEL)
    with pytest.raises(PublishError, match="the connection broke"):
        publish.publish(plan, endpoint="http://127.0.0.1:9", token=TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        send(plan, hub)


@pytest.mark.parametrize("where", ["argument", "environment"])
@pytest.mark.parametrize("token", ["hf_SE\x0bCRET", "hf_SE\x0cCRET", "hf_SEÉCRET", "hf_SE CRET"])
def test_a_malformed_token_is_not_printed(hub, model_folder, monkeypatch, token, where):
    plan = publish.model_plan(model_folder, MODEL)
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=r"a character that no token has: run `hf auth login`") as caught:
        send(plan, hub, token=token if where == "argument" else None)
    assert "CRET" not in "".join(traceback.format_exception(caught.value))
    assert hub.requests == []


@pytest.mark.parametrize("status", [400, 500])
def test_a_token_quoted_by_the_hub_is_masked(hub, model_folder, status):
    hub.faults = [Fault("POST", "repos/create", status, says=f"Bearer {TOKEN} may not")]
    with pytest.raises(PublishError, match="Hub") as caught:
        send(publish.model_plan(model_folder, MODEL), hub)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("path", ["whoami", "/commit/"])
def test_a_silent_hub_times_out(hub, model_folder, monkeypatch, path):
    monkeypatch.setattr(hub_client, "TIMEOUT", 0.3)
    plan = publish.model_plan(model_folder, MODEL)
    hub.faults = [Fault("GET" if path == "whoami" else "POST", path, seconds=60)]
    start = time.monotonic()
    with pytest.raises(PublishError, match=r"the connection broke .*ReadTimeout.*: rerun the command"):
        send(plan, hub)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            "this machine cannot .*No space left on device.*free space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/tmp/x"), "this machine cannot .*Permission denied"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "the connection broke"),
    ],
)
def test_a_full_disk_is_not_a_broken_connection(hub, model_folder, monkeypatch, error, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "snapshot_download", fails)
    with pytest.raises(PublishError, match=rf"{message}.*It is published"):
        send(publish.model_plan(model_folder, MODEL), hub)


def test_the_model_card_has_the_measured_values(model_folder):
    plan = publish.model_plan(model_folder, MODEL)
    card = huggingface_hub.ModelCard(plan.files["README.md"].decode())
    rows = {row.metric: row for row in provenance.verified(model_folder).own}
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0"
    assert card.data.metrics == ["accuracy", "f1"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        metric: rows[metric].value for metric in NAMES.keys() & rows.keys()
    }
    rate = str(presets.PROFILES["offline"].stage1.learning_rate)
    for part in (
        prompts.SYSTEM,
        prompts.USER,
        provenance.verified(model_folder).weights,
        "one tile of 192 x 192",
        rate,
        "@software",
    ):
        assert part in card.content


def test_the_model_card_names_base_and_dataset(model_folder):
    found = replace(provenance.verified(model_folder), base_model="HuggingFaceTB/base", dataset="somebody/images")
    processor = json.loads((model_folder / "processor_config.json").read_text())
    processor["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 768}}
    card = cards.model_card(found, cards.describe_budget(processor), MODEL, {"F32": 1})
    assert (card.data.base_model, card.data.datasets) == ("HuggingFaceTB/base", ["somebody/images"])
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


@pytest.mark.slow
def test_the_notebook_s_publishing_cells_work(hub, built, model_folder, tmp_path, capsys, monkeypatch):
    """The last cells but one of both notebooks, as they stand, with the names that earlier cells leave behind."""
    send = publish.publish
    monkeypatch.setattr(publish, "publish", lambda plan, **how: send(plan, endpoint=hub.url, token=TOKEN, **how))
    for name, value in environment(hub).items():  # for the app of the Space
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    settings = presets.PROFILES["offline"]
    stages = [settings.stage1, settings.stage2]
    rows = provenance.verified(model_folder).rows
    (tmp_path / "out").mkdir()
    shutil.move(model_folder, tmp_path / "out" / "stage2")
    known = {
        "output": tmp_path / "out",
        "base_model": "a/b",
        "rows": images.load(built),
        "stages": stages,
        "measured": rows,
    }
    monkeypatch.setenv("FOODEXTRACT_PUSH_DATASET_TO_HUB", "somebody/zero")  # as `make demo` does
    for name, extra in {
        "01_fine_tune_vlm_v3_smolVLM_500m.ipynb": known
        | {"push_to_hub": "somebody/one", "push_space_to_hub": "somebody/two"},
        "00_create_vlm_dataset.ipynb": {"output": built, "push_to_hub": None, "publish": publish},
    }.items():
        cells = json.loads((ROOT / name).read_text())["cells"]
        exec("".join(cells[-2]["source"]), {"os": os, **extra})
    cell = "".join(json.loads((ROOT / "01_fine_tune_vlm_v3_smolVLM_500m.ipynb").read_text())["cells"][-2]["source"])
    exec(cell, {"os": os, **known, "push_to_hub": None, "push_space_to_hub": None})
    printed = capsys.readouterr().out
    assert "published as somebody/one" in printed
    assert "push_to_hub is not set: nothing was published" in printed
    assert FoodRecord.parse(answer_in(printed.partition("app answers ")[2]))
    assert hub.repositories["space", "somebody/two"].variables == {"FOODEXTRACT_MODEL": "somebody/one"}
    assert hub.files("dataset", "somebody/zero").keys() >= {"README.md", "data/test-00000-of-00001.parquet"}
    assert '"is_food": 1' in printed.partition("about a test row:\n  label")[2].splitlines()[0]
    measured = json.loads(hub.files("model", "somebody/one")["evaluation.json"])
    assert (measured["base_model"], measured["dataset"]) == ("a/b", "scenes")

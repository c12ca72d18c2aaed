"""Model, data set and Space, from this machine to the Hub and back again.

A plan is made first, and it is all that happens: every file in it was allowed by name, and `--dry-run` prints it. Everything goes up in
one commit, so readers see the old state or the new one and never half of it. What is there already is not sent again, so an interrupted
run is taken up by the same command. At the end what was published is fetched, compared byte for byte, loaded and asked about an image.
`hub` says what goes wrong on the way.
"""

import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import datasets
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, SpaceInfo

from foodextract.data.dataset import SPLITS, load, record_of
from foodextract.data.samples import DatasetError
from foodextract.data.scenes import draw_scene
from foodextract.evaluation import provenance
from foodextract.evaluation.scoring import count_items, try_read
from foodextract.hub.client import PublishError, client, explained
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import ModelError, newest_tuned
from foodextract.names import HUB_BASE, HUB_MODEL, HUB_SPACE, REPOSITORY
from foodextract.reporting.cards import UNNAMED, dataset_card, image_budget, model_card, stored_as
from foodextract.schema import FoodRecord

__all__ = ["Plan", "PublishError", "dataset_card", "dataset_plan", "model_plan", "publish", "space_plan"]

Kind = Literal["model", "dataset", "space"]

# What may leave this machine; a star stands for part of a name, never for a folder. Checkpoints, optimizer states, caches and tokens are
# not in it, and neither is anything that nobody thought of.
ALLOWED: dict[Kind, tuple[str, ...]] = {
    "model": (
        "README.md", "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "training.json", provenance.EVALUATION,
    ),
    "dataset": ("README.md", "data/*.parquet", "report.json", "rejects.jsonl", "findings.jsonl", "near_duplicates.jsonl"),
    "space": ("README.md", "LICENSE", "NOTICE", "requirements.txt", "thumbnail.png", "*.py"),
}  # fmt: skip
PACKAGE = (
    "**/*.py",
    "data/**/*.txt",
    "models/bundled/*/*.json",
    "models/bundled/*/*.jinja",
    "models/bundled/*/*.safetensors",
)
SHARD = 500_000_000  # bytes of Arrow a parquet file is made from, as `datasets` does


PATIENCE = 1800  # seconds for the app of a Space that was fetched again to load its model and answer
VARIABLE = "FOODEXTRACT_MODEL"
# How readers find it when something goes wrong before, while and after the one commit is made.
UNCHANGED = "Nothing is lost: readers see what was there before"
HALFWAY = (
    f"{UNCHANGED} (or all of this, if only the Hub's answer got lost), and what was sent already is not sent again"
)
DONE = "It is published, and readers see it; it has only not been fetched again and tried, which the same command does"


@dataclass(frozen=True)
class Plan:
    """What would be published where: a path, or text made for the occasion, for each name in the repository."""

    kind: Kind
    repo_id: str
    files: dict[str, Path | bytes]
    told: str = ""  # where it comes from
    model: str | None = None  # what a Space answers with

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()
        }

    def __str__(self) -> str:
        return self._listing(self.sizes())

    def summary(self) -> str:
        """The plan with one line a folder, for notebooks."""
        folders: dict[str, list[int]] = {}
        for name, size in self.sizes().items():
            folder, slash, _ = name.partition("/")
            folders.setdefault(folder + slash, []).append(size)
        return self._listing(
            {
                f"{name} ({len(sizes)} files)" if name.endswith("/") else name: sum(sizes)
                for name, sizes in folders.items()
            }
        )

    def _listing(self, sizes: dict[str, int]) -> str:
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        total = f"{sum(sizes.values()):>15,}  bytes in {len(self.files)} files"
        return "\n".join([f"{self.kind} {self.repo_id}{self.told}:", *lines, total])


def model_plan(folder: str | Path, repo_id: str = HUB_MODEL) -> Plan:
    """The model in `folder`, its card made from its `evaluation.json`.

    Raises PublishError when that is missing or about other weights, for files that cannot be read, and for a model that is not the one
    which people expect under HUB_MODEL.
    """
    folder = Path(folder)
    try:
        found = provenance.verified(folder)
    except provenance.ProvenanceError as error:
        raise PublishError(str(error)) from error
    if repo_id == HUB_MODEL and found.base_model != HUB_BASE:
        raise PublishError(
            f"{folder} was made from {found.base_model}, and {HUB_MODEL} from {HUB_BASE}: give it a name by --to owner/name"
        )
    try:
        budget = image_budget(json.loads((folder / "processor_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{folder}/processor_config.json is missing or not SmolVLM's ({type(error).__name__}: {error}): save the processor again"
        ) from error
    try:
        counts = get_local_safetensors_metadata(folder).parameter_count
    except (NotASafetensorsRepoError, OSError, ValueError, KeyError) as error:
        raise PublishError(
            f"{folder}/model.safetensors.index.json is missing or wrong ({error}): save the model again"
        ) from error
    card = str(model_card(found, budget, repo_id, counts))
    files = {**_allowed(folder, ALLOWED["model"]), "README.md": card.encode()}
    return Plan("model", repo_id, files, f" from {folder}, {sum(counts.values()):,} parameters in {stored_as(counts)}")


def dataset_plan(folder: str | Path, repo_id: str) -> Plan:
    """The data set that notebook 00 wrote to `folder`, as parquet files. Raises PublishError.

    They are made here, in a temporary folder (TMPDIR says where) that goes when the plan goes.
    """
    folder = Path(folder)
    try:
        rows = load(folder)
    except DatasetError as error:
        raise PublishError(str(error)) from error
    if not (folder / "README.md").is_file():
        raise PublishError(f"{folder} has no card (README.md): run notebook 00, which writes it from its own figures")
    card = (folder / "README.md").read_text(encoding="utf-8").replace(UNNAMED, repo_id)
    made = Path(tempfile.mkdtemp(prefix="foodextract-"))
    plan = Plan("dataset", repo_id, {}, f" from {folder}")
    weakref.finalize(plan, shutil.rmtree, made)
    (made / "data").mkdir()
    for split in SPLITS:
        shards = math.ceil(max(rows[split].data.nbytes, 1) / SHARD)
        for number in range(shards):
            part = rows[split].shard(shards, number, contiguous=True)
            part.to_parquet(made / "data" / f"{split}-{number:05}-of-{shards:05}.parquet")
    plan.files.update(
        _allowed(folder, ALLOWED["dataset"]) | _allowed(made, ALLOWED["dataset"]) | {"README.md": card.encode()}
    )
    return plan


def space_plan(folder: str | Path, repo_id: str = HUB_SPACE, model: str = HUB_MODEL) -> Plan:
    """The demo in `folder`, which asks `model`, with this very package beside it, so that the Space runs what was tested here.

    Raises PublishError.
    """
    folder = Path(folder)
    if not (folder / "app.py").is_file():
        raise PublishError(f"{folder} holds no Space (no app.py): run this from the repository's root")
    if not provenance.is_hub_id(model):
        raise PublishError(f"a Space cannot ask {model}: publish that model, then give its Hub id (--model owner/name)")
    package = {f"foodextract/{name}": path for name, path in _allowed(Path(__file__).parents[1], PACKAGE).items()}
    licenses = _allowed(folder.resolve().parents[1], ("LICENSE", "NOTICE"))
    card = (
        (folder / "README.md")
        .read_text(encoding="utf-8")
        .replace(HUB_MODEL, model)
        .replace(f"spaces/{HUB_SPACE}", f"spaces/{repo_id}")
    )
    files = {**_allowed(folder, ALLOWED["space"]), **licenses, **package, "README.md": card.encode()}
    return Plan("space", repo_id, files, f" from {folder}, which asks {model}", model)


def publish(plan: Plan, *, public: bool = False, endpoint: str | None = None, token: str | None = None) -> str:
    """Do what the plan says, fetch it again, and return what was found there, in a sentence or two. Raises PublishError.

    The token comes from `hf auth login` or HF_TOKEN unless one is given; it is never printed.
    """
    api = client(endpoint, token)
    where = {"repo_id": plan.repo_id, "repo_type": plan.kind}
    explaining = partial(explained, plan.repo_id, token=token)
    with explaining(UNCHANGED):
        api.whoami()
        if plan.model:
            with explained(plan.model, UNCHANGED, token):
                api.model_info(plan.model)
        now = _opened(api, plan, public)
        there = [entry for entry in api.list_repo_files(**where, revision=now.sha) if _is_ours(plan.kind, entry)]
        asks = api.get_space_variables(plan.repo_id).get(VARIABLE) if plan.model else None
    state = HALFWAY
    if plan.model and (asks is None or asks.value != plan.model):  # first: the new files never ask the old model
        with explaining(UNCHANGED):
            api.add_space_variable(plan.repo_id, VARIABLE, plan.model)
        state = f"{HALFWAY}. But it asks {plan.model} already"
    with explaining(state):
        changes = [CommitOperationAdd(name, what) for name, what in plan.files.items()]
        changes += [CommitOperationDelete(name, is_folder=False) for name in there if name not in plan.files]
        commit = api.create_commit(
            **where, operations=changes, commit_message=f"{plan.kind} from {REPOSITORY}", parent_commit=now.sha
        )
    with tempfile.TemporaryDirectory() as folder:
        with explaining(DONE):
            api.snapshot_download(**where, revision=commit.oid, local_dir=folder)
        answer = _tried(plan, Path(folder))
    where = (
        "a rehearsal Hub on this machine"
        if urlsplit(api.endpoint).hostname in ("127.0.0.1", "localhost")
        else api.endpoint
    )
    return f"published as {plan.repo_id} on {where} ({'private' if now.private else 'public'}), {len(plan.files)} files.\n{answer}"


def _opened(api: HfApi, plan: Plan, public: bool) -> ModelInfo | DatasetInfo | SpaceInfo:
    """The repository, made unless it is there already and as visible as wanted. Raises PublishError."""
    space = (
        {"space_sdk": "gradio", "space_variables": [{"key": VARIABLE, "value": plan.model}]}
        if plan.kind == "space"
        else {}
    )
    api.create_repo(plan.repo_id, repo_type=plan.kind, private=not public, exist_ok=True, **space)
    now = api.repo_info(plan.repo_id, repo_type=plan.kind)
    if now.private and public:
        raise PublishError(
            f"{plan.repo_id} is there already and private, with all that was in it before: "
            "make it public in its settings on the Hub, or leave out --public"
        )
    if not public and not now.private:
        raise PublishError(
            f"{plan.repo_id} is there already and everybody can read it: say --public if that is what you want"
        )
    return now


def _tried(plan: Plan, folder: Path) -> str:
    """What the fetched files answer about one image, after they were compared with what was sent. Raises PublishError."""
    for name, what in plan.files.items():
        fetched = folder / name
        if not fetched.is_file() or not (
            fetched.read_bytes() == what if isinstance(what, bytes) else filecmp.cmp(fetched, what, shallow=False)
        ):
            raise PublishError(f"{plan.repo_id}: {name} came back different from what was sent: run this again")
    seed = 7 if plan.kind == "model" else 8  # model and Space answer about different scenes
    scene = next(scene for index in count() if (scene := draw_scene(seed, "test", index)).record.food_items)
    try:
        if plan.kind == "model":
            answer = Extractor.from_pretrained(folder).extract(scene.image).to_json()
            return f"Fetched again, it answers about a drawn scene:\n{_verdict(scene.record, answer)}"
        if plan.kind == "dataset":
            rows = datasets.load_dataset(str(folder), cache_dir=str(folder / ".rows"))
            shown, model = list(rows["test"]["is_food"]), newest_tuned()
            row = rows["test"][shown.index(max(shown))]
            answer = Extractor.from_pretrained(model).extract(row["image"]).to_json()
            counts = " and ".join(f"{len(rows[split]):,} {split}" for split in SPLITS)
            return f"Fetched again, it has {counts} rows. {model.name} answers about one of test:\n{_verdict(record_of(row), answer)}"
    except ModelError as error:
        raise PublishError(f"{plan.repo_id} was published, but what was fetched does not load: {error}") from error
    scene.image.save(folder / "image.png")
    asked = [sys.executable, "-c", "import app; print(app.extract('image.png'))"]
    env = {**os.environ, "PYTHONPATH": str(folder), VARIABLE: plan.model}
    try:
        run = subprocess.run(asked, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise PublishError(
            f"{plan.repo_id} was published, but its app gave no answer within {PATIENCE} s: try `make space` with {VARIABLE}={plan.model}"
        ) from None
    if run.returncode:
        raise PublishError(f"{plan.repo_id} was published, but its app does not answer:\n{run.stderr.strip()[-2000:]}")
    answer = run.stdout.strip().splitlines()[-1]
    return f"Fetched again, its app answers about a drawn scene:\n{_verdict(scene.record, answer)}"


def _verdict(label: FoodRecord, answer: str) -> str:
    """Label, answer and what the answer got right, a line each."""
    items = count_items(label, try_read(answer))
    verdict = f"{items.found} of {items.found + items.missed} items found, {items.invented} invented"
    return f"  label    {label.to_json()}\n  answer   {answer}\n  verdict  {verdict}"


def _allowed(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files below `folder` that a pattern names, sorted, by their path in it; links to elsewhere are no files of ours."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _is_ours(kind: Kind, name: str) -> bool:
    """Whether a file on the Hub is of the kind that this module puts there, so that one no longer wanted goes; others' files stay."""
    path = PurePosixPath(name)
    package = kind == "space" and path.parts[0] == "foodextract"
    return package or any(len(path.parts) == len(PurePosixPath(one).parts) and path.match(one) for one in ALLOWED[kind])

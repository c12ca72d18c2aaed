"""Publish a model, a dataset or the Space on the Hub.

A plan lists every file, each allowed by name; `--dry-run` prints it. All files go up in one commit, so readers see the
old state or the new one. Files the Hub already has are not sent again: rerun an interrupted command to resume. Finally
the published files are downloaded, compared byte for byte, loaded, and asked about an image.
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
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import datasets
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError

from foodextract.data.dataset import load, record_of
from foodextract.data.samples import DatasetError
from foodextract.data.scenes import draw_scene
from foodextract.data.selection import SPLITS
from foodextract.evaluation import provenance
from foodextract.evaluation.scoring import count_items, try_read
from foodextract.hub.client import PublishError, client, explained
from foodextract.inference.confidence import Calibration
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import ModelError, find_model
from foodextract.models.training_data import TrainingData
from foodextract.names import HUB_BASE, HUB_MODEL, HUB_SPACE, REPOSITORY
from foodextract.reporting.cards import UNNAMED, describe_budget, model_card, stored_as

Kind = Literal["model", "dataset", "space"]

# A star stands for part of a name, never for a folder. Anything else (checkpoints, caches, tokens …) stays here.
ALLOWED: dict[Kind, tuple[str, ...]] = {
    "model": (
        "README.md", "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "model.safetensors", "model-*-of-*.safetensors",
        "model.safetensors.index.json", "training.json", TrainingData.FILE, provenance.Provenance.FILE,
        Calibration.FILE,
    ),
    "dataset": (
        "README.md", "data/*.parquet", "report.json", "rejects.jsonl", "issues.jsonl", "near_duplicates.jsonl",
    ),
    "space": (
        "README.md", "LICENSE", "NOTICE", "requirements.txt", "thumbnail.png", "*.py", "*.css", "examples/*",
    ),
}  # fmt: skip
PACKAGE = (
    "**/*.py", "py.typed", "data/**/*.txt", "training/presets/*.toml", "reporting/templates/*.md",
    "models/bundled/*/*.json", "models/bundled/*/*.jinja", "models/bundled/*/*.safetensors",
)  # fmt: skip
SHARD = 500_000_000  # bytes of Arrow per parquet file, as in `datasets`
APP_TIMEOUT = 1800  # seconds for the downloaded app to load its model and answer
VARIABLE = "FOODEXTRACT_MODEL"
# What readers see after an error before, during and after the commit.
UNCHANGED = "Readers still see the previous version"
INTERRUPTED = (
    f"{UNCHANGED} (or the new one, if only the Hub's answer got lost); files that were sent are not sent again"
)
PUBLISHED = "It is published, but not verified: the same command verifies it"


@dataclass(frozen=True)
class Plan:
    """What goes where: for each file name in the repository a path, or bytes made for it."""

    kind: Kind
    repo_id: str
    files: dict[str, Path | bytes]
    source: str = ""  # where the files come from, for `str`
    model: str | None = None  # the Hub id of a Space's model

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {n: len(file) if isinstance(file, bytes) else file.stat().st_size for n, file in self.files.items()}

    def __str__(self) -> str:
        return self._listing(self.sizes())

    def summary(self) -> str:
        """Return the plan with one line per folder, for notebooks."""
        folders: dict[str, list[int]] = {}
        for name, size in self.sizes().items():
            folder, slash, _ = name.partition("/")
            folders.setdefault(folder + slash, []).append(size)
        return self._listing({f"{n} ({len(s)} files)" if n[-1] == "/" else n: sum(s) for n, s in folders.items()})

    def _listing(self, sizes: dict[str, int]) -> str:
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        total = f"{sum(sizes.values()):>15,}  bytes in {len(self.files)} files"
        return "\n".join([f"{self.kind} {self.repo_id}{self.source}:", *lines, total])


def model_plan(folder: str | Path, repo_id: str = HUB_MODEL) -> Plan:
    """Plan the model in `folder`, with a card made from its evaluation.json.

    Raises PublishError if the evaluation is missing or about other weights, a file is damaged, or the base does not
    fit the project's own name HUB_MODEL.
    """
    folder = Path(folder)
    try:
        found = provenance.verified(folder)
    except provenance.ProvenanceError as error:
        raise PublishError(str(error)) from error
    if repo_id == HUB_MODEL and found.base_model != HUB_BASE:
        raise PublishError(
            f"{HUB_MODEL} is made from {HUB_BASE}, but {folder} from {found.base_model}: name it with --to owner/name"
        )
    file = folder / "processor_config.json"
    try:
        budget = describe_budget(json.loads(file.read_text(encoding="utf-8")))
        file = folder / "model.safetensors.index.json"
        counts = {str(dtype): n for dtype, n in get_local_safetensors_metadata(folder).parameter_count.items()}
    except (NotASafetensorsRepoError, OSError, ValueError, KeyError, TypeError) as error:
        message = f"{file} is missing or damaged ({type(error).__name__}: {error}): save the model and processor again"
        raise PublishError(message) from error
    card = str(model_card(found, budget, repo_id, counts))
    files = {**_allowed(folder, ALLOWED["model"]), "README.md": card.encode()}
    return Plan("model", repo_id, files, f" from {folder}, {sum(counts.values()):,} parameters in {stored_as(counts)}")


def dataset_plan(folder: str | Path, repo_id: str) -> Plan:
    """Plan the dataset that notebook 00 wrote to `folder`, as parquet files. Raises PublishError.

    The files are made in a temporary folder (see TMPDIR), which is deleted together with the plan.
    """
    folder = Path(folder)
    try:
        rows = load(folder)
        card = (folder / "README.md").read_text(encoding="utf-8").replace(UNNAMED, repo_id)
    except DatasetError as error:
        raise PublishError(str(error)) from error
    except FileNotFoundError:
        raise PublishError(f"{folder} has no card (README.md): run notebook 00, which writes it") from None
    made = Path(tempfile.mkdtemp(prefix="foodextract-"))
    (made / "data").mkdir()
    for split in SPLITS:
        shards = math.ceil(max(rows[split].data.nbytes, 1) / SHARD)
        for number in range(shards):
            part = rows[split].shard(shards, number, contiguous=True)
            part.to_parquet(made / "data" / f"{split}-{number:05}-of-{shards:05}.parquet")
    files = _allowed(folder, ALLOWED["dataset"]) | _allowed(made, ALLOWED["dataset"]) | {"README.md": card.encode()}
    plan = Plan("dataset", repo_id, files, f" from {folder}")
    weakref.finalize(plan, shutil.rmtree, made)
    return plan


def space_plan(folder: str | Path, repo_id: str = HUB_SPACE, model: str = HUB_MODEL) -> Plan:
    """Plan the demo in `folder` with this package beside it, so that the Space runs what was tested here.

    Raises PublishError.
    """
    folder = Path(folder)
    if not (folder / "app.py").is_file():
        raise PublishError(f"{folder} holds no Space (no app.py): run this in the root of the repository")
    if not provenance.is_hub_id(model):
        raise PublishError(f"a Space cannot use {model}: publish that model, then give its Hub id (--model owner/name)")
    package = {f"foodextract/{name}": path for name, path in _allowed(Path(__file__).parents[1], PACKAGE).items()}
    licenses = _allowed(folder.resolve().parents[1], ("LICENSE", "NOTICE"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    card = card.replace(HUB_MODEL, model).replace(f"spaces/{HUB_SPACE}", f"spaces/{repo_id}")
    files = {**_allowed(folder, ALLOWED["space"]), **licenses, **package, "README.md": card.encode()}
    return Plan("space", repo_id, files, f" from {folder}, with the model {model}", model)


def publish(plan: Plan, *, public: bool = False, endpoint: str | None = None, token: str | None = None) -> str:
    """Publish a plan, download and verify it, and return a summary. Raises PublishError.

    The token comes from `hf auth login` or HF_TOKEN unless one is given; it is never printed.
    """
    api = client(endpoint, token)
    repository: dict[str, Any] = {"repo_id": plan.repo_id, "repo_type": plan.kind}
    with explained(plan.repo_id, UNCHANGED, token):
        api.whoami()
        if plan.model:
            with explained(plan.model, UNCHANGED, token):
                api.model_info(plan.model)
        private, revision = _create(api, plan, public)
        remote = [name for name in api.list_repo_files(**repository, revision=revision) if _is_ours(plan.kind, name)]
        variable = api.get_space_variables(plan.repo_id).get(VARIABLE) if plan.model else None
    state = INTERRUPTED
    if plan.model and (variable is None or variable.value != plan.model):  # first: new files never use the old model
        with explained(plan.repo_id, UNCHANGED, token):
            api.add_space_variable(plan.repo_id, VARIABLE, plan.model)
        state = f"{INTERRUPTED}. But it already uses {plan.model}"
    with explained(plan.repo_id, state, token):
        commit = api.create_commit(
            **repository,
            operations=[
                *(CommitOperationAdd(name, file) for name, file in plan.files.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in remote if name not in plan.files),
            ],
            commit_message=f"{plan.kind} from {REPOSITORY}",
            parent_commit=revision,
        )
    with tempfile.TemporaryDirectory() as folder:
        with explained(plan.repo_id, PUBLISHED, token):
            api.snapshot_download(**repository, revision=commit.oid, local_dir=folder)
        answer = _verify(plan, Path(folder))
    local = urlsplit(api.endpoint).hostname in ("127.0.0.1", "localhost")
    hub, access = "a rehearsal Hub on this machine" if local else api.endpoint, "private" if private else "public"
    return f"published as {plan.repo_id} on {hub} ({access}), {len(plan.files)} files.\n{answer}"


def _create(api: HfApi, plan: Plan, public: bool) -> tuple[bool, str | None]:
    """Create the repository unless it exists; return whether it is private, and its revision. Raises PublishError."""
    options: dict[str, Any] = {}
    if plan.kind == "space":
        options = {"space_sdk": "gradio", "space_variables": [{"key": VARIABLE, "value": plan.model}]}
    api.create_repo(plan.repo_id, repo_type=plan.kind, private=not public, exist_ok=True, **options)
    info = api.repo_info(plan.repo_id, repo_type=plan.kind)
    if info.private and public:
        raise PublishError(
            f"{plan.repo_id} exists and is private, with all earlier contents: "
            "make it public in its settings on the Hub, or omit --public"
        )
    if not public and not info.private:
        raise PublishError(f"{plan.repo_id} exists and is public: add --public if that is intended")
    return bool(info.private), info.sha


def _verify(plan: Plan, folder: Path) -> str:
    """Compare the downloaded files with what was sent, and let them answer about an image. Raises PublishError."""
    for name, file in plan.files.items():
        copy = folder / name
        if not copy.is_file() or not (
            copy.read_bytes() == file if isinstance(file, bytes) else filecmp.cmp(copy, file, shallow=False)
        ):
            raise PublishError(f"{plan.repo_id}: {name} came back different from what was sent: rerun the command")
    seed = 7 if plan.kind == "model" else 8  # model and Space answer about different scenes
    scene = next(scene for index in count() if (scene := draw_scene(seed, "test", index)).record.food_items)
    label, subject = scene.record, "The downloaded copy answers about a drawn scene"
    try:
        if plan.kind == "model":
            answer = Extractor.from_pretrained(folder).extract(scene.image).to_json()
        elif plan.kind == "dataset":
            rows = datasets.load_dataset(str(folder), cache_dir=str(folder / ".rows"))
            is_food, model = list(rows["test"]["is_food"]), Path(find_model())
            row = rows["test"][is_food.index(max(is_food))]
            label, answer = record_of(row), Extractor.from_pretrained(model).extract(row["image"]).to_json()
            counts = " and ".join(f"{len(rows[split]):,} {split}" for split in SPLITS)
            subject = f"The downloaded copy has {counts} rows. {model.name} answers about a test row"
        else:
            scene.image.save(folder / "image.png")
            answer = _ask_app(plan, folder)
            subject = "The downloaded app answers about a drawn scene"
    except ModelError as error:
        raise PublishError(f"{plan.repo_id} was published, but the downloaded copy does not load: {error}") from error
    items = count_items(label, try_read(answer))
    verdict = f"{items.found} of {items.found + items.missed} items found, {items.invented} invented"
    return f"{subject}:\n  label    {label.to_json()}\n  answer   {answer}\n  verdict  {verdict}"


def _ask_app(plan: Plan, folder: Path) -> str:
    """Run the downloaded Space on its image.png in a process of its own. Raises PublishError."""
    command = [sys.executable, "-c", "import app; print(app.extract('image.png'))"]
    env = {**os.environ, "PYTHONPATH": str(folder), VARIABLE: plan.model or ""}
    try:
        run = subprocess.run(  # noqa: S603
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=APP_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise PublishError(
            f"{plan.repo_id} was published, but its app gave no answer within {APP_TIMEOUT} s: "
            f"try `make space` with {VARIABLE}={plan.model}"
        ) from None
    if run.returncode:
        raise PublishError(f"{plan.repo_id} was published, but its app fails:\n{run.stderr.strip()[-2000:]}")
    return run.stdout.strip().splitlines()[-1]


def _allowed(folder: Path, patterns: Sequence[str]) -> dict[str, Path | bytes]:
    """Return the files below `folder` that match a pattern, sorted by path, without symbolic links."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _is_ours(kind: Kind, name: str) -> bool:
    """Whether this module publishes files of this name, so that an outdated one is deleted. Other files stay."""
    path = PurePosixPath(name)
    if kind == "space" and path.parts[0] == "foodextract":
        return True
    return any(len(path.parts) == len(PurePosixPath(one).parts) and path.match(one) for one in ALLOWED[kind])

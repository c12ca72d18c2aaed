"""Model, data set and Space, from this machine to the Hub and back again.

A plan is made first, and it is all that happens: every file in it was allowed by name, and `--dry-run` prints it. Everything goes up in
one commit, so readers see the old state or the new one and never half of it. What is there already is not sent again, so an interrupted
run is taken up by the same command. At the end what was published is fetched, compared byte for byte, loaded and asked about a picture.
"""

import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import datasets
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from foodextract import evidence
from foodextract.cards import dataset_card, model_card
from foodextract.dataset import SPLITS, load, record_of
from foodextract.extractor import Extractor
from foodextract.models import ModelError, newest_tuned
from foodextract.profiles import HUB_MODEL, HUB_SPACE, OWNER, REPOSITORY
from foodextract.samples import DatasetError
from foodextract.scenes import draw_scene

__all__ = ["Plan", "PublishError", "dataset_card", "dataset_plan", "model_plan", "publish", "space_plan"]

Kind = Literal["model", "dataset", "space"]
CODE = f"https://github.com/{OWNER}/{REPOSITORY}"

# What may leave this machine; a star stands for part of a name, never for a folder. Checkpoints, optimizer states, caches and tokens are
# not in it, and neither is anything that nobody thought of.
ALLOWED: dict[Kind, tuple[str, ...]] = {
    "model": (
        "README.md", "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "training.json", evidence.EVALUATION,
    ),
    "dataset": ("README.md", "data/*.parquet", "report.json", "rejects.jsonl", "findings.jsonl", "near_duplicates.jsonl"),
    "space": ("README.md", "LICENSE", "NOTICE", "requirements.txt", "thumbnail.png", "*.py"),
}  # fmt: skip
PACKAGE = ("*.py", "words/*.py", "words/*.txt", "drawings/*.txt", "bundled/*/*.json", "bundled/*/*.jinja", "bundled/*/*.safetensors")
SHARD = 500_000_000  # bytes of Arrow a parquet file is made from, as `datasets` does


class PublishError(ValueError):
    """Something that cannot be published, or a Hub that refused it; the message says what to do."""


@dataclass(frozen=True)
class Plan:
    """What would be published where: a path, or text made for the occasion, for each name in the repository."""

    kind: Kind
    repo_id: str
    files: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()}

    def __str__(self) -> str:
        lines = [f"{size:>15,}  {name}" for name, size in self.sizes().items()]
        return "\n".join([f"{self.kind} {self.repo_id}:", *lines, f"{sum(self.sizes().values()):>15,}  bytes in {len(lines)} files"])


def model_plan(folder: str | Path, repo_id: str = HUB_MODEL) -> Plan:
    """The model in `folder`, its card made from its `evaluation.json`. Raises PublishError when that is missing or about other weights."""
    try:
        found = evidence.verified(folder)
        files = _allowed(Path(folder), ALLOWED["model"])
        processor = json.loads(files["processor_config.json"].read_text(encoding="utf-8"))
    except (evidence.EvidenceError, KeyError) as error:
        raise PublishError(
            str(error) if str(error).startswith(str(folder)) else f"{folder} has no {error}: save its processor too"
        ) from error
    card = str(model_card(found, processor, repo_id, CODE))
    return Plan("model", repo_id, {**files, "README.md": card.encode()})


def dataset_plan(folder: str | Path, repo_id: str) -> Plan:
    """The data set that notebook 00 wrote to `folder`, as parquet files, which are made here. Raises PublishError."""
    folder = Path(folder)
    try:
        rows = load(folder)
    except DatasetError as error:
        raise PublishError(str(error)) from error
    if not (folder / "README.md").is_file():
        raise PublishError(f"{folder} has no card (README.md): run notebook 00, which writes it from its own figures")
    made = folder / "parquet"
    shutil.rmtree(made, ignore_errors=True)
    (made / "data").mkdir(parents=True)
    for split in SPLITS:
        shards = math.ceil(max(rows[split].data.nbytes, 1) / SHARD)
        for number in range(shards):
            part = rows[split].shard(shards, number, contiguous=True)
            part.to_parquet(made / "data" / f"{split}-{number:05}-of-{shards:05}.parquet")
    return Plan("dataset", repo_id, _allowed(folder, ALLOWED["dataset"]) | _allowed(made, ALLOWED["dataset"]))


def space_plan(folder: str | Path, repo_id: str = HUB_SPACE, model: str = HUB_MODEL) -> Plan:
    """The demo in `folder` with this very package beside it, so that the Space runs what was tested here. Raises PublishError."""
    folder = Path(folder)
    if not (folder / "app.py").is_file():
        raise PublishError(f"{folder} holds no Space (no app.py): run this from the repository's root")
    package = {f"foodextract/{name}": path for name, path in _allowed(Path(__file__).parent, PACKAGE).items()}
    licences = _allowed(folder.resolve().parents[1], ("LICENSE", "NOTICE"))
    card = (folder / "README.md").read_text(encoding="utf-8").replace(HUB_MODEL, model).replace(f"spaces/{HUB_SPACE}", f"spaces/{repo_id}")
    return Plan("space", repo_id, {**_allowed(folder, ALLOWED["space"]), **licences, **package, "README.md": card.encode()})


def publish(plan: Plan, *, public: bool = False, model: str | None = None, endpoint: str | None = None, token: str | None = None) -> str:
    """Do what the plan says, fetch it again, and return what was found there, in a sentence or two. Raises PublishError.

    `model` is what a Space answers with. The token comes from `hf auth login` or HF_TOKEN unless one is given; it is never printed.
    """
    api = HfApi(endpoint=endpoint, token=token)
    where = {"repo_id": plan.repo_id, "repo_type": plan.kind}
    with _explained(plan.repo_id):
        api.whoami()
        api.create_repo(**where, private=not public, exist_ok=True, space_sdk="gradio" if plan.kind == "space" else None)
        now = api.repo_info(**where)
        if not public and not now.private:
            raise PublishError(f"{plan.repo_id} is there already and everybody can read it: say --public if that is what you want")
        there = [entry for entry in api.list_repo_files(**where, revision=now.sha) if _is_ours(plan.kind, entry)]
        changes = [CommitOperationAdd(name, what) for name, what in plan.files.items()]
        changes += [CommitOperationDelete(name, is_folder=False) for name in there if name not in plan.files]
        message = f"{plan.kind} from {REPOSITORY}"
        commit = api.create_commit(**where, operations=changes, commit_message=message, parent_commit=now.sha)
        if plan.kind == "space" and model:
            api.add_space_variable(plan.repo_id, "FOODEXTRACT_MODEL", model)
    with tempfile.TemporaryDirectory() as folder:
        with _explained(plan.repo_id):
            api.snapshot_download(**where, revision=commit.oid, local_dir=folder)
        answer = _tried(plan, Path(folder), model)
    return f"published as {plan.repo_id} on {api.endpoint} ({'private' if now.private else 'public'}), {len(plan.files)} files.\n{answer}"


def _tried(plan: Plan, folder: Path, model: str | None) -> str:
    """What the fetched files answer about one picture, after they were compared with what was sent. Raises PublishError."""
    for name, what in plan.files.items():
        fetched = folder / name
        if not fetched.is_file() or not (
            fetched.read_bytes() == what if isinstance(what, bytes) else filecmp.cmp(fetched, what, shallow=False)
        ):
            raise PublishError(f"{plan.repo_id}: {name} came back different from what was sent: run this again")
    scene = draw_scene(7, "test", 0)
    try:
        if plan.kind == "model":
            return f"Fetched again, it answers {Extractor.from_pretrained(folder).extract(scene.image).to_json()}"
        if plan.kind == "dataset":
            rows = datasets.load_dataset(str(folder), cache_dir=str(folder / ".rows"))
            row, model = rows["test"][0], newest_tuned()
            answer = Extractor.from_pretrained(model).extract(row["image"]).to_json()
            counts = " and ".join(f"{len(rows[split]):,} {split}" for split in SPLITS)
            return (
                f"Fetched again, it has {counts} rows; the first of test is {record_of(row).to_json()}, and {model.name} answers {answer}"
            )
    except ModelError as error:
        raise PublishError(f"{plan.repo_id} was published, but what was fetched does not load: {error}") from error
    scene.image.save(folder / "picture.png")
    asked = [sys.executable, "-c", "import app; print(app.extract('picture.png'))"]
    env = {**os.environ, "PYTHONPATH": str(folder), **({"FOODEXTRACT_MODEL": model} if model else {})}
    run = subprocess.run(asked, cwd=folder, env=env, capture_output=True, text=True)  # noqa: S603
    if run.returncode:
        raise PublishError(f"{plan.repo_id} was published, but its app does not answer:\n{run.stderr.strip()[-2000:]}")
    return f"Fetched again, its app answers {run.stdout.strip().splitlines()[-1]}"


def _allowed(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files below `folder` that a pattern names, sorted, by their path in it; links to elsewhere are no files of ours."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _is_ours(kind: Kind, name: str) -> bool:
    """Whether a file on the Hub is of the kind that this module puts there, so that one no longer wanted goes; others' files stay."""
    patterns = (*ALLOWED[kind], "foodextract/*") if kind == "space" else ALLOWED[kind]
    return any(fnmatch(name, pattern) for pattern in patterns)


ADVICE = {
    401: "the Hub does not know the token: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: take one with write permission for this owner, or another name with --to",
    404: "the Hub does not find it: check the name and what the token may see",
    409: "somebody else is changing it: look at it, then run this again",
    412: "somebody else has changed it in the meantime: look at it, then run this again",
    429: "the Hub asks for a pause: wait some minutes, then run this again",
}


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what the Hub client raises into a PublishError that says what is lost (nothing) and what to do."""
    kept = "Nothing is lost: readers see what was there before, and what was sent already is not sent again."
    try:
        yield
    except PublishError:
        raise
    except LocalTokenNotFoundError as error:
        raise PublishError(f"{repo_id}: {ADVICE[401]}") from error
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be sent: HF_HUB_OFFLINE=0 foodextract publish …") from error
    except (HTTPError, OSError, RuntimeError) as error:  # a RuntimeError wraps what went wrong with one large file
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "response", None) is None:
            cause = cause.__cause__
        status = cause.response.status_code if cause is not None else None
        fault = f"the Hub has a fault (HTTP {status}): run this again later"
        broken = f"the connection broke ({_last(error)}): run this again"
        raise PublishError(f"{repo_id}: {ADVICE.get(status, fault) if status else broken}. {kept}") from error
    except ValueError as error:  # a name that the Hub does not allow, a card whose front matter it does not understand
        raise PublishError(f"{repo_id}: {error}") from error


def _last(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

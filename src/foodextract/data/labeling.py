"""Label a folder of images with a larger model (`foodextract label`). Written beside the images:

metadata.jsonl          the labels, as `sources.labeled_folder` reads them
metadata.rejects.jsonl  images without a label, the reason, and the answer where there was one
metadata.ledger.jsonl   one line per outcome, appended at once; a later run asks only for what it lacks
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from foodextract.data.teacher import Outcome, Teacher, TeacherError, label_image, make_client, question
from foodextract.images import find_images


@dataclass
class Summary:
    """Counts of one run: `images` = `known` + `duplicates` + `asked`, `asked` = `labeled` + `rejected` + `failed`."""

    images: int = 0  # files
    known: int = 0  # finished by an earlier run
    duplicates: int = 0  # same bytes as another file of this run
    asked: int = 0
    labeled: int = 0
    rejected: int = 0  # no valid answer, or not an image; final
    failed: int = 0  # no answer, or an unreadable file; a later run tries again
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.images:,} images: {self.known:,} finished before, {self.duplicates:,} duplicates, "
            f"{self.asked:,} asked = {self.labeled:,} labeled + {self.rejected:,} rejected + {self.failed:,} failed\n"
            f"{self.seconds:.1f} s, {self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens"
        )


class _Ledger:
    """The last outcome of each image of one recipe (teacher, prompt and image size), by the sha256 of its file."""

    def __init__(self, path: Path, recipe: str) -> None:
        self.recipe = recipe
        self.digests: dict[str, str] = {}  # file name → sha256
        self.outcomes: dict[str, tuple[str, bytes]] = {}  # sha256 → status and line
        try:
            self.file = path.open("a+b")
        except OSError as error:
            raise TeacherError(f"cannot write {path}: {error.strerror}") from error
        self.file.seek(0)
        for line in self.file:
            with suppress(ValueError, LookupError, TypeError):  # cut off when a run was killed
                self._index(json.loads(line), line)
        if self.file.tell():
            self.file.write(b"\n")  # ends a line that was cut off

    def add(self, name: str, digest: str, outcome: Outcome) -> None:
        """Append the outcome of a file, or the status "same" for a copy of another one."""
        entry = {"file_name": name, "sha256": digest, "recipe": self.recipe} | outcome
        line = json.dumps(entry).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        self._index(entry, line)

    def _index(self, entry: dict[str, Any], line: bytes) -> None:
        if entry["recipe"] == self.recipe:
            self.digests[entry["file_name"]] = entry["sha256"]
            if entry["status"] != "same":
                self.outcomes[entry["sha256"]] = entry["status"], line

    def write(self, folder: Path, output: Path, license: str | None) -> None:
        """Write the labels and the rejects of the files that exist."""
        labels, rejects = [], []
        for name, digest in sorted(self.digests.items()):
            if digest not in self.outcomes or not (folder / name).is_file():
                continue
            entry = json.loads(self.outcomes[digest][1])
            if entry["status"] == "labeled":
                row = {"file_name": name, **entry["record"], "source": entry["source"]}
                labels.append(row | ({"license": license} if license else {}))
            else:
                reason = {key: entry[key] for key in ("status", "reason", "raw") if key in entry}
                rejects.append({"file_name": name, **reason})
        for target, rows in ((output, labels), (output.with_suffix(".rejects.jsonl"), rejects)):
            partial = target.with_name(target.name + ".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            partial.replace(target)


@dataclass
class _Run:
    """What the workers of one run share."""

    teacher: Teacher
    client: openai.AsyncOpenAI
    folder: Path
    ledger: _Ledger
    limit: int | None
    waiting: Iterator[Path]  # one for all workers, so that there are only as many tasks as requests
    known: set[str]  # sha256 of the images that need no request
    bar: tqdm
    summary: Summary
    claimed: set[str] = field(default_factory=set)  # sha256 of the images of this run
    failures: int = 0  # of the endpoint, since its last answer
    answered: bool = False

    async def work(self) -> None:
        for path in self.waiting:
            name = path.relative_to(self.folder).as_posix()
            data, digest = await asyncio.to_thread(_read, path)
            if digest in self.known or digest in self.claimed:
                self.summary.known += digest in self.known
                self.summary.duplicates += digest not in self.known
                if self.ledger.digests.get(name) != digest:
                    self.ledger.add(name, digest, {"status": "same"})
            elif self.summary.asked == self.limit:
                return
            else:
                self.claimed.add(digest)
                await self._label(name, digest, data)
            self.summary.images += 1
            counts = {key: getattr(self.summary, key) for key in ("labeled", "rejected", "failed")}
            self.bar.set_postfix(counts, refresh=False)
            self.bar.update()

    async def _label(self, name: str, digest: str, data: bytes | OSError) -> None:
        self.summary.asked += 1
        if isinstance(data, OSError):
            outcome: Outcome = {"status": "failed", "reason": f"cannot be read: {data.strerror}"}
        else:
            outcome = await label_image(self.client, self.teacher, data)
        if outcome["status"] == "labeled":
            outcome["source"] = f"teacher:{self.teacher.model}"
        self.ledger.add(name, digest, outcome)
        self.summary.prompt_tokens += outcome.get("prompt_tokens", 0)
        self.summary.completion_tokens += outcome.get("completion_tokens", 0)
        setattr(self.summary, outcome["status"], getattr(self.summary, outcome["status"]) + 1)
        if "http" in outcome:
            self.failures += 1
        elif "prompt_tokens" in outcome:
            self.answered, self.failures = True, 0
        if remedy := self._remedy(outcome.get("http")):
            kept = f"Finished labels are kept. The last failure: {outcome['reason'][:500]}"
            raise TeacherError(f"{self.teacher.endpoint}: {remedy}. {kept}")

    def _remedy(self, status: int | None) -> str:
        """Return what the user must do before further requests make sense, "" to continue.

        An endpoint that has answered before may recover, or refuse a single image only.
        """
        new = not self.answered
        if status == 401 or (status == 403 and new):
            return "it refuses the key: set OPENAI_API_KEY to one that may use this model"
        if status == 404 and new:
            models = f"{self.teacher.endpoint}/models lists what it serves"
            return f"check that the address ends in /v1 and that it serves {self.teacher.model!r} ({models})"
        if status == 0 and new:
            return "it cannot be reached: start the server, or check the address"
        if self.failures >= max(10, 2 * self.teacher.concurrency):
            return f"{self.failures} failures in a row: check the server, then rerun the command to resume"
        return ""


def _read(path: Path) -> tuple[bytes | OSError, str]:
    try:
        data = path.read_bytes()
        return data, hashlib.sha256(data).hexdigest()
    except OSError as error:
        return error, f"unread {path}"


async def label_folder(
    teacher: Teacher,
    folder: str | Path,
    output: str | Path | None = None,
    *,
    limit: int | None = None,
    license: str | None = None,
    retry_rejected: bool = False,
) -> Summary:
    """Label the images in and below `folder`. `await` it in a notebook, use `asyncio.run` elsewhere.

    `output` is FOLDER/metadata.jsonl by default; its file names are relative to `folder`. At most `limit` images are
    asked for. Another model, prompt or image size starts afresh, and `output` then holds its labels only. Memory holds
    `concurrency` images and about a kilobyte per file. Raises TeacherError, also when the endpoint fails during the
    run; `output` then holds the labels so far.
    """
    folder, summary, started = Path(folder), Summary(), time.monotonic()
    output = Path(output or folder / "metadata.jsonl")
    path = output.with_suffix(".ledger.jsonl")
    files = list(find_images([folder])) if folder.is_dir() else []
    if not files:
        raise TeacherError(f"no images in {folder}: name a folder with .jpg, .png, .webp … files")
    if output.exists() and not path.exists():
        raise TeacherError(f"{output} has labels of another origin (there is no {path.name}): choose another output")
    asked = question(teacher, "") | {"max_tokens": None, "max_edge": teacher.max_edge}
    recipe = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    final = {"labeled"} if retry_rejected else {"labeled", "rejected"}
    async with make_client(teacher) as client:
        ledger = _Ledger(path, recipe)
        known = {digest for digest, (status, _) in ledger.outcomes.items() if status in final}
        with closing(ledger.file), tqdm(total=len(files), desc="labeling", unit="image") as bar:
            run = _Run(teacher, client, folder, ledger, limit, iter(files), known, bar, summary)
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(teacher.concurrency):
                        workers.create_task(run.work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                summary.seconds = time.monotonic() - started
                ledger.write(folder, output, license)
    return summary

"""Label a folder of images with a larger model (`foodextract label`). Written beside the images:

metadata.jsonl          the labels, as `folders.labeled_folder` reads them
metadata.rejects.jsonl  images without a label, the reason, and the answer where there was one
metadata.ledger.jsonl   one line per outcome, appended at once; a later run asks only for what it lacks
"""

import asyncio
import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from foodextract.data.teacher import Endpoint, Teacher, TeacherError, make_client, question
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

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """The cost in the currency of the prices, which are per million tokens."""
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.images:,} images: {self.known:,} finished before, {self.duplicates:,} duplicates, "
            f"{self.asked:,} asked = {self.labeled:,} labeled + {self.rejected:,} rejected + {self.failed:,} failed\n"
            f"{self.seconds:.1f} s, {self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens"
        )


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
    asked for. Images are known by the sha256 of their files. Another model, prompt or image size starts afresh, and
    `output` then holds its labels only. Memory holds `concurrency` images and about a kilobyte per file. Raises
    TeacherError, also when the endpoint fails during the run; `output` then holds the labels so far.
    """
    folder, started = Path(folder), time.monotonic()
    output = Path(output or folder / "metadata.jsonl")
    path = output.with_suffix(".ledger.jsonl")
    images = list(find_images([folder])) if folder.is_dir() else []
    if not images:
        raise TeacherError(f"no images in {folder}: name a folder with .jpg, .png, .webp … files")
    if output.exists() and not path.exists():
        raise TeacherError(f"{output} has labels of another origin (there is no {path.name}): choose another output")
    asked = question(teacher, "") | {"max_tokens": None, "max_edge": teacher.max_edge}
    recipe = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    async with make_client(teacher) as client:
        try:
            ledger = path.open("a+b")
        except OSError as error:
            raise TeacherError(f"cannot write {path}: {error.strerror}") from error
        with ledger:
            outcomes, written = _read_ledger(ledger, recipe)
            if written and output.exists() and _digest(output) not in written:
                raise TeacherError(f"{output} was edited: rename it to keep the changes, or choose another output")
            final = ("labeled",) if retry_rejected else ("labeled", "rejected")
            known = {digest for digest, line in outcomes.items() if json.loads(line)["status"] in final}
            digests = {image: _digest(image) for image in tqdm(images, "reading", unit="image")}
            unknown: dict[str, Path] = {}
            for image, digest in digests.items():
                if digest not in known:
                    unknown.setdefault(digest, image)
            chosen = dict(islice(unknown.items(), limit))
            summary = Summary(asked=len(chosen), known=sum(digest in known for digest in digests.values()))
            summary.duplicates = sum(digest in chosen for digest in digests.values()) - summary.asked
            summary.images = summary.known + summary.duplicates + summary.asked
            endpoint, queue = Endpoint(client, teacher), iter(chosen.items())
            bar = tqdm(total=len(images), initial=summary.images - summary.asked, desc="labeling", unit="image")

            async def work() -> None:
                for digest, image in queue:  # shared, so that there are only as many tasks as requests
                    outcome = await endpoint.label(image)
                    name = image.relative_to(folder).as_posix()
                    entry = {"file_name": name, "sha256": digest, "recipe": recipe} | outcome
                    outcomes[digest] = json.dumps(entry).encode() + b"\n"
                    ledger.write(outcomes[digest])
                    ledger.flush()
                    for count, number in ((outcome["status"], 1), *outcome.get("usage", {}).items()):
                        setattr(summary, count, getattr(summary, count) + number)
                    bar.set_postfix(rejected=summary.rejected, failed=summary.failed, refresh=False)
                    bar.update()
                    endpoint.check(outcome)

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(teacher.concurrency):
                        workers.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                bar.close()
                summary.seconds = time.monotonic() - started
                _write_output(output, ledger, folder, digests, outcomes, license)
    return summary


def _read_ledger(ledger: BinaryIO, recipe: str) -> tuple[dict[str, bytes], set[str]]:
    """Return the last line of each image of this recipe, and the sha256 of every output that was written."""
    outcomes, written = {}, set()
    ledger.seek(0)
    for line in ledger:
        with suppress(ValueError, LookupError, TypeError):  # cut off when a run was killed
            entry = json.loads(line)
            if "written" in entry:
                written.add(entry["written"])
            elif entry["recipe"] == recipe and "status" in entry:
                outcomes[entry["sha256"]] = line
    if ledger.tell():
        ledger.write(b"\n")  # ends a line that was cut off
    return outcomes, written


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return f"unread {path}"


def _write_output(
    output: Path,
    ledger: BinaryIO,
    folder: Path,
    digests: dict[Path, str],
    outcomes: dict[str, bytes],
    license: str | None,
) -> None:
    labels, rejects = [], []
    for path, digest in digests.items():
        if digest not in outcomes:
            continue
        entry, row = json.loads(outcomes[digest]), {"file_name": path.relative_to(folder).as_posix()}
        if entry["status"] == "labeled":
            labels.append({**row, **entry["record"], "source": entry["source"]})
            labels[-1] |= {"license": license} if license else {}
        else:
            rejects.append(row | {key: entry[key] for key in ("status", "reason", "raw") if key in entry})
    for target, rows in ((output, labels), (output.with_suffix(".rejects.jsonl"), rejects)):
        text = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["file_name"]))
        if target == output:
            if not labels and output.exists():
                continue  # those of another model, while this one has none
            ledger.write(json.dumps({"written": hashlib.sha256(text.encode()).hexdigest()}).encode() + b"\n")
            ledger.flush()
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text)
        partial.replace(target)

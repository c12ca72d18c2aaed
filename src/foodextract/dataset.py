"""Sources → one cleaned, deduplicated, split image folder → conversational rows.

A source is a generator of `Sample`s (a picture that has a label) and `Reject`s (one that has none we could use, and why). `build`
consumes any of them once, one picture at a time, and writes:

    OUT/train/*.png, OUT/train/metadata.jsonl      an ordinary image folder: `load_dataset("imagefolder", data_dir=OUT)` reads it
    OUT/test/…                                     the same for the held-out fifth
    OUT/arrow/                                     the same rows as a saved DatasetDict
    OUT/rejects.jsonl, OUT/report.json             what was left out and why; counts
"""

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import datasets
from pydantic import ValidationError
from tqdm import tqdm

from foodextract import prompts
from foodextract.pictures import PictureError, open_picture
from foodextract.scenes import Split, draw_scenes
from foodextract.schema import AnswerError, FoodRecord

Source = Literal["scenes", "hub", "folder"]
HUB_DATASET = "berkeruveyik/vlm-food-4k-not-food-dataset"
METADATA = "metadata.jsonl"
TEST_SHARE = 0.2
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "name": datasets.Value("string"),
        "is_food": datasets.Value("int8"),
        "image_title": datasets.Value("string"),
        "food_items": datasets.List(datasets.Value("string")),
        "drink_items": datasets.List(datasets.Value("string")),
        "category": datasets.Value("string"),
        "group": datasets.Value("string"),
        "source": datasets.Value("string"),
        "licence": datasets.Value("string"),
        "pixels_sha256": datasets.Value("string"),
    }
)


class DatasetError(ValueError):
    """A data set that cannot be built or read; the message names the place and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One labelled picture on its way into the data set. `data` is the encoded file; `split` is set where the source fixes it."""

    name: str
    data: bytes
    record: FoodRecord
    source: str
    licence: str
    category: str = ""
    group: str = ""
    split: Split | None = None


@dataclass(frozen=True)
class Reject:
    """One row that was read and not kept."""

    name: str
    reason: str


# --------------------------------------------------------------------------------------------------------------------------------- sources


def scene_source(seed: int, train: int, test: int) -> Iterator[Sample]:
    """Drawn scenes; the two splits come fixed, because the test split has non-food objects of its own."""
    for split, count in (("train", train), ("test", test)):
        for index, scene in enumerate(draw_scenes(seed, split, count)):
            png = io.BytesIO()
            scene.image.save(png, "PNG", compress_level=1)  # the noise hardly compresses, and 1 is three times as fast as the default
            kinds = sorted({placed.kind for placed in scene.objects})
            yield Sample(
                name=f"scene-{seed}-{split}-{index:05d}.png",
                data=png.getvalue(),
                record=scene.record,
                source="scenes",
                licence="CC BY-SA 4.0 (OpenMoji)",
                category=" + ".join(kinds) or "nothing",
                split=split,
            )


def folder_source(folder: str | Path) -> Iterator[Sample | Reject]:
    """A folder of pictures with one JSON line each in `metadata.jsonl`: `file_name`, the four keys of a record, and optionally
    `category`, `group` (pictures to keep on one side of the split), `source` and `licence`. Raises DatasetError without that file."""
    folder = Path(folder)
    metadata = folder / METADATA
    if not metadata.is_file():
        raise DatasetError(
            f"{folder} has no {METADATA}: write one line of JSON a picture, for example\n"
            '{"file_name": "a.jpg", "is_food": 1, "image_title": "beer", "food_items": [], "drink_items": ["beer"]}'
        )
    with metadata.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _folder_row(folder, f"{METADATA} line {number}", line)


def _folder_row(folder: Path, where: str, line: str) -> Sample | Reject:
    try:
        row = json.loads(line)
        where = f"{where} ({row['file_name']})"
        path = (folder / row["file_name"]).resolve()
        if not path.is_relative_to(folder.resolve()):
            return Reject(where, "file_name leads out of the folder")
        record = FoodRecord.model_validate({key: row[key] for key in FoodRecord.model_fields})
        return Sample(
            name=row["file_name"],
            data=path.read_bytes(),
            record=record,
            source=row.get("source") or folder.name,
            licence=row.get("licence") or "not stated",
            category=str(row.get("category") or ""),
            group=str(row.get("group") or ""),
        )
    except json.JSONDecodeError as error:
        return Reject(where, f"not JSON ({error}): write one JSON object a line")
    except (KeyError, TypeError) as error:
        return Reject(where, f"lacks {error}: needs file_name, {', '.join(FoodRecord.model_fields)}")
    except ValidationError as error:
        return Reject(where, f"breaks the schema: {error.errors()[0]['loc']} {error.errors()[0]['msg']}")
    except OSError as error:
        return Reject(where, f"picture cannot be read: {error.strerror}")


def hub_source(dataset_id: str = HUB_DATASET) -> Iterator[Sample | Reject]:
    """The Hub data set of the original project: `image`, `output_json` and columns of provenance. Raises DatasetError offline.

    Its labels were written by a larger model, so contradictions are read as `FoodRecord.parse_lenient` reads them.
    """
    try:
        rows = datasets.load_dataset(dataset_id, split="train", streaming=True).cast_column("image", datasets.Image(decode=False))
        for index, row in enumerate(rows):
            name = f"{row.get('image_name') or row.get('image_id') or index}"
            picture, label = row["image"], row["output_json"]
            try:
                yield Sample(
                    name=f"{index:06d}-{Path(name).stem}{Path(picture.get('path') or name).suffix or '.jpg'}",
                    data=picture["bytes"],
                    record=FoodRecord.parse_lenient(label if isinstance(label, str) else json.dumps(label)),
                    source=str(row.get("image_source") or dataset_id),
                    licence=f"see {dataset_id}",
                    category=str(row.get("food270_class_name") or row.get("category") or ""),
                )
            except AnswerError as error:
                yield Reject(name, str(error))
    except (OSError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DatasetError(
            f"cannot read {dataset_id!r} from the Hub ({type(error).__name__}): check the name and the connection, "
            "or use the source `scenes` or `folder`"
        ) from error


def open_source(
    source: Source,
    *,
    folder: str | Path | None = None,
    dataset_id: str = HUB_DATASET,
    seed: int = 42,
    scenes: tuple[int, int] = (2000, 500),
) -> Iterator[Sample | Reject]:
    """The source of that name. `scenes` is how many to draw for train and for test. Raises DatasetError where its place is missing."""
    if source == "scenes":
        return scene_source(seed, *scenes)
    if source == "hub":
        return hub_source(dataset_id)
    if source == "folder":
        if folder is None:
            raise DatasetError(f"the source `folder` needs a folder: pictures and their {METADATA}")
        return folder_source(folder)
    raise DatasetError(f"there is no source {source!r}: choose scenes, hub or folder")


# ----------------------------------------------------------------------------------------------------------------------------------- build


def split_of(group: str, seed: int, test_share: float = TEST_SHARE) -> Split:
    """Which side a group falls on: by its hash, so that adding pictures moves none that is already there."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < test_share * 2**64 else "train"


def build(
    samples: Iterable[Sample | Reject],
    out: str | Path,
    *,
    seed: int = 42,
    test_share: float = TEST_SHARE,
    total: int | None = None,
) -> dict[str, Any]:
    """Write the data set to `out` (all or nothing) and return its report.

    A picture whose pixels were seen before is rejected as a duplicate; so is one that cannot be decoded. Groups stay together.
    Raises DatasetError when a split would be empty, and when `out` holds something that is not a data set built here.
    """
    out = Path(out)
    if out.exists() and not (out / "report.json").exists() and any(out.iterdir()):
        raise DatasetError(f"{out} exists and is not a data set built here: choose another folder or empty it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows: dict[Split, list[dict]] = {"train": [], "test": []}
    rejects: list[Reject] = []
    seen: dict[str, str] = {}
    for split in rows:
        (partial / split).mkdir(parents=True)
    for sample in tqdm(samples, total=total, desc="building the data set", unit="picture"):
        if isinstance(sample, Reject):
            rejects.append(sample)
            continue
        try:
            picture = open_picture(sample.data)
        except PictureError as error:
            rejects.append(Reject(sample.name, str(error)))
            continue
        pixels = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        if pixels in seen:
            rejects.append(Reject(sample.name, f"duplicate of {seen[pixels]}"))
            continue
        seen[pixels] = sample.name
        split = sample.split or split_of(sample.group or pixels, seed, test_share)
        file_name = f"{pixels[:8]}-{Path(sample.name).name}"  # unique, also where two subfolders use the same name
        (partial / split / file_name).write_bytes(sample.data)
        rows[split].append(
            {"file_name": file_name, "name": sample.name, **sample.record.model_dump(), "category": sample.category}
            | {"group": sample.group, "source": sample.source, "licence": sample.licence, "pixels_sha256": pixels}
        )
    if not all(rows.values()):
        counts = ", ".join(f"{len(found)} {split}" for split, found in rows.items())
        reasons = "".join(f"\n  {reject.name}: {reject.reason}" for reject in rejects[:5])
        raise DatasetError(f"too few usable pictures ({counts}, {len(rejects)} rejected): add pictures or mend their labels{reasons}")
    report = _report(rows, rejects)
    _write(partial, rows, rejects, report)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return report


def _report(rows: dict[Split, list[dict]], rejects: list[Reject]) -> dict[str, Any]:
    everything = list(chain(*rows.values()))
    fingerprint = hashlib.sha256("".join(sorted(json.dumps(row, sort_keys=True) for row in everything)).encode()).hexdigest()
    return {
        "read": len(everything) + len(rejects),
        "kept": len(everything),
        "rejected": len(rejects),
        "duplicates": sum(reject.reason.startswith("duplicate") for reject in rejects),
        "train": len(rows["train"]),
        "test": len(rows["test"]),
        "is_food": sum(row["is_food"] for row in everything),
        "food_items": Counter(item for row in everything for item in row["food_items"]).most_common(),
        "drink_items": Counter(item for row in everything for item in row["drink_items"]).most_common(),
        "sources": Counter(row["source"] for row in everything).most_common(),
        "licences": Counter(row["licence"] for row in everything).most_common(),
        "fingerprint": fingerprint,
    }


def _write(folder: Path, rows: dict[Split, list[dict]], rejects: list[Reject], report: dict[str, Any]) -> None:
    splits = {}
    for split, found in rows.items():
        found.sort(key=lambda row: row["file_name"])
        (folder / split / METADATA).write_text("".join(json.dumps(row) + "\n" for row in found))
        columns = [{**row, "image": str(folder / split / row["file_name"])} for row in found]
        splits[split] = datasets.Dataset.from_list([{key: row[key] for key in FEATURES} for row in columns], features=FEATURES)
    datasets.DatasetDict(splits).save_to_disk(folder / "arrow")  # the pictures' bytes go in with them
    (folder / "rejects.jsonl").write_text("".join(json.dumps({"name": r.name, "reason": r.reason}) + "\n" for r in rejects))
    (folder / "report.json").write_text(json.dumps(report, indent=1))


def load(folder: str | Path) -> datasets.DatasetDict:
    """The data set that `build` wrote to `folder`. Raises DatasetError for a folder without one."""
    arrow = Path(folder) / "arrow"
    if not (arrow / "dataset_dict.json").is_file():
        raise DatasetError(f"{folder} holds no data set: run 00_create_vlm_dataset.ipynb with this folder as its output first")
    return datasets.load_from_disk(arrow)


def open_dataset(where: str | Path, build_in: str | Path, seed: int = 42) -> datasets.DatasetDict:
    """A data set by whatever names it: a folder that `build` wrote, a labelled picture folder, or a Hub id of the original's columns.

    The latter two are built in `build_in` first. Raises DatasetError.
    """
    where, name = Path(where), str(where)
    if (where / METADATA).is_file():
        build(folder_source(where), build_in, seed=seed)
    elif not where.exists() and name.count("/") == 1 and not where.is_absolute():
        build(hub_source(name), build_in, seed=seed)
    else:
        return load(where)
    return load(build_in)


# ------------------------------------------------------------------------------------------------------------------------------------ rows


def record_of(row: dict[str, Any]) -> FoodRecord:
    """The label of one row."""
    return FoodRecord(**{key: row[key] for key in FoodRecord.model_fields})


def as_conversations(split: datasets.Dataset) -> datasets.Dataset:
    """The rows a trainer takes, made on access so that no picture is held in memory: `images`, `prompt`, `completion`."""

    def conversations(batch: dict[str, list]) -> dict[str, list]:
        records = [record_of(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {
            "images": [[open_picture(image)] for image in batch["image"]],
            "prompt": [prompts.conversation() for _ in records],
            "completion": [prompts.answer(record) for record in records],
        }

    return split.with_transform(conversations)

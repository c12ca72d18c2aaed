"""Data sets on the Hub, read from a local Hub: columns, reuse and faults."""

import io
import json
import os
import shutil
import zipfile

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import yaml
from packaging.version import Version
from PIL import Image
from typer.testing import CliRunner

from foodextract.__main__ import app
from foodextract.data import build, dataset, hub_source, ingest, sources
from foodextract.data.samples import DatasetError
from foodextract.evaluation import provenance
from foodextract.hub import publish
from foodextract.models.loading import TINY_TUNED
from foodextract.reporting import cards
from foodextract.schema import FoodRecord
from foodextract.training.config import PROFILES
from hub_server import Fault, Repository

ID = "somebody/images"
PIE = {"is_food": 1, "image_title": "pie", "food_items": ["pie"], "drink_items": []}


def textured(number):
    coarse = np.random.default_rng(number).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def parquet(rows, features=None):
    file = io.BytesIO()
    images = {"image": datasets.Image()} if "image" in rows[0] else {}
    made = datasets.Dataset.from_list([{key: value for key, value in row.items() if key not in images} for row in rows])
    wanted = datasets.Features({**made.features, **images, **(features or {})})
    datasets.Dataset.from_list(rows, features=wanted).to_parquet(file)
    return file.getvalue()


def put(hub, files, repo_id=ID):
    repository = hub.repositories.setdefault(("dataset", repo_id), Repository(False))
    return repository.commit(files)


def labeled(numbers, **columns):
    return [{"image": textured(number), **PIE, **columns} for number in numbers]


def original(numbers, label=PIE):
    return [
        {"image": textured(n), "output_json": json.dumps(label), "image_name": f"{n}.jpg", "image_source": "food270"}
        for n in numbers
    ]


@pytest.fixture
def published(online, drawn, tmp_path):
    """The drawn data set as notebook 00 publishes it, under ID."""
    folder = shutil.copytree(drawn, tmp_path / "drawn")
    (folder / "README.md").write_text(
        str(cards.dataset_card(json.loads((folder / "report.json").read_text()), "drawn", 42, "abc"))
    )
    plan = publish.dataset_plan(folder, ID)
    put(online, {name: what if isinstance(what, bytes) else what.read_bytes() for name, what in plan.files.items()})
    return online


def content(split):
    return [
        {key: value for key, value in row.items() if key != "image"} | {"pixels": row["image"].tobytes()}
        for row in split
    ]


# whose columns


def test_a_published_data_set_is_used_as_it_is(published, rows, tmp_path):
    opened = dataset.open_dataset(ID, tmp_path / "built")
    for split in ("train", "test"):
        assert opened[split].features == rows[split].features
        assert content(opened[split]) == content(rows[split])
    assert provenance.origin(opened) == ID
    assert provenance.origin({"test": opened["test"].select(range(3))}) == ID
    report = json.loads((tmp_path / "built" / "report.json").read_text())
    assert report["sources"] == [[ID, 56]]
    assert (report["train"], report["test"], report["issues"]) == (40, 16, [])


def test_labels_of_a_published_data_set_are_not_changed(online, tmp_path, rows):
    odd = {"image_title": "A photo of PIE", "food_items": ["flour", "Pie"], "is_food": 1, "drink_items": []}
    split = rows["test"].map(lambda row: odd, features=rows["test"].features)
    files = {}
    for name in ("train", "test"):
        file = io.BytesIO()
        split.to_parquet(file)
        files[f"data/{name}-00000-of-00001.parquet"] = file.getvalue()
    put(online, files)
    opened = dataset.open_dataset(ID, tmp_path / "built")
    assert {
        json.dumps(dataset.record_of(row).model_dump(), sort_keys=True)
        for row in opened["train"].remove_columns("image")
    } == {json.dumps(odd, sort_keys=True)}
    assert len(opened["train"]) == len(opened["test"]) == 16


@pytest.mark.parametrize("changed", [{"label_scope": None}, {"license": "licence"}], ids=["lacks", "spelling"])
def test_published_data_sets_of_earlier_releases_load(online, tmp_path, rows, changed):
    files = {}
    for name, split in rows.items():
        file = io.BytesIO()
        for column, other in changed.items():
            split = split.rename_column(column, other) if other else split.remove_columns(column)
        split.to_parquet(file)
        files[f"data/{name}-00000-of-00001.parquet"] = file.getvalue()
    put(online, files)
    opened = dataset.open_dataset(ID, tmp_path / "built")
    assert [content(opened[split]) for split in opened] == [content(rows[split]) for split in rows]


def test_records_with_the_old_spelling_keep_their_license(online):
    put(online, {"data/train.parquet": parquet(labeled(range(1), licence="CC0"))})
    [sample] = sources.hub(ID)
    assert sample.license == "CC0"


def test_notebook_00_takes_a_published_data_set_too(published, rows, tmp_path):
    report = dataset.build(sources.mix([(sources.open_source("hub", dataset_id=ID), 1)]), tmp_path / "out")
    assert report["sources"] == [(ID, 56)]
    again = dataset.load(tmp_path / "out")
    assert provenance.origin(again) == ID
    for split in ("train", "test"):
        assert list(again[split]["name"]) == list(rows[split]["name"])
        assert list(again[split]["license"]) == list(rows[split]["license"])


def test_a_data_set_built_from_a_published_one_names_it_as_source(online, rows, tmp_path):
    files = {}
    for split, part in rows.items():
        file = io.BytesIO()
        part.map(
            lambda row: {"source": "some/where", "license": "see the/original"}, features=part.features
        ).to_parquet(file)
        files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
    put(online, files)
    dataset.build(sources.hub(ID), tmp_path / "out")
    assert provenance.origin(dataset.load(tmp_path / "out")) == ID


@pytest.mark.parametrize("stated", ["validation", "dev", "val", "valid", "test", "holdout"])
def test_other_records_keep_their_splits(online, tmp_path, stated):
    columns = {"category": "pies", "license": "CC0", "label_scope": "primary"}
    files = {
        "data/train.parquet": parquet(labeled(range(20), **columns)),
        f"data/{stated}.parquet": parquet(labeled(range(20, 28))),
    }
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: data/{split}.parquet\n" for split in ("train", stated)
    )
    put(online, {**files, "README.md": f"{card}---\n".encode()})
    opened = dataset.open_dataset(ID, tmp_path / "built")
    assert [len(opened["train"]), len(opened["test"])] == [20, 8]
    assert {name[:6] for name in opened["test"]["name"]} == {f"{number:06d}" for number in range(20, 28)}
    assert set(opened["train"]["license"]) == {"CC0"}
    assert dataset.scopes_of(opened["train"]) == ["primary"] * 20
    assert provenance.origin(opened) == ID


def test_records_with_one_split_are_split_here(online, tmp_path):
    put(online, {"data/train.parquet": parquet(labeled(range(30)))})
    opened = dataset.open_dataset(ID, tmp_path / "built", seed=3)
    assert len(opened["train"]) > len(opened["test"]) > 0
    assert provenance.held_out(opened) == "split by foodextract with seed 3"


def test_only_a_train_split_is_trained_on(online, tmp_path):
    put(online, {"data/test.parquet": parquet(labeled(range(30)))})
    with pytest.raises(DatasetError, match=r"too few usable images \(0 train, 30 test"):
        dataset.open_dataset(ID, tmp_path / "built")


def test_images_beside_their_metadata_are_fetched(online, tmp_path):
    """An image folder as notebook 00 writes it, uploaded as it is."""
    files = {}
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        for number in numbers:
            file = io.BytesIO()
            textured(number).save(file, "PNG")
            files[f"{split}/{number}.png"] = file.getvalue()
        lines = [json.dumps({"file_name": f"{number}.png", **PIE, "drink_items": ["tea"]}) for number in numbers]
        files[f"{split}/metadata.jsonl"] = "\n".join(lines).encode()
    put(online, files)
    opened = dataset.open_dataset(ID, tmp_path / "built")
    assert [len(opened["train"]), len(opened["test"])] == [6, 3]
    assert sorted(image.tobytes() for image in opened["test"]["image"]) == sorted(
        textured(number).tobytes() for number in range(6, 9)
    )
    online.faults = [Fault("GET", r"/train/4\.png", 404)]
    with pytest.raises(DatasetError, match=r"the connection to the Hub failed at 4\.png of 'somebody/images'"):
        dataset.build(sources.hub(ID), tmp_path / "again")


@pytest.mark.parametrize(
    "path",
    [
        "{here}/private.png",
        "file://{here}/private.png",
        "file://{here}/private.png::hf://datasets/somebody/images@main/a.zip",
        "zip://a.png::file://{here}/private.zip::hf://datasets/somebody/images@main/a.zip",
        "https://example.com/a.png",
        "hf://datasets/somebody/private@main/a.png",
        None,
    ],
)
def test_a_row_cannot_name_a_local_file_or_another_address(tmp_path, path):
    textured(1).save(tmp_path / "private.png")
    with pytest.raises(OSError, match="the row has no image"):
        hub_source.image_bytes(ID, {"bytes": None, "path": path and path.format(here=tmp_path)})


def test_images_in_an_archive_are_read(online):
    archive, image = io.BytesIO(), io.BytesIO()
    textured(5).save(image, "PNG")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", image.getvalue())
        file.writestr("metadata.jsonl", json.dumps({"file_name": "a.png", **PIE, "drink_items": ["tea"]}))
    put(online, {"train.zip": archive.getvalue()})
    [sample] = sources.hub(ID)
    assert sample.label["drink_items"] == ["tea"]
    assert sample.read() == image.getvalue()


def test_other_columns_are_an_error_that_names_the_needed_ones(online, tmp_path):
    put(online, {"data/train.parquet": parquet([{"image": textured(1), "caption": "a pie", "label": 3}])})
    wanted = "drink_items and food_items and image and image_title and is_food, or image and output_json"
    for ask in (
        lambda: dataset.open_dataset(ID, tmp_path / "built"),
        lambda: sources.open_source("hub", dataset_id=ID),
    ):
        with pytest.raises(
            DatasetError, match=f"'somebody/images' has the columns caption, image, label: it needs {wanted}"
        ):
            ask()


@pytest.mark.parametrize(
    "files", [{}, {"images.py": b"import datasets"}, {"notes.txt": b""}], ids=["empty", "script", "text"]
)
def test_repositories_without_a_data_set_are_an_error(online, tmp_path, files):
    put(online, {"README.md": b"", **files})
    with pytest.raises(DatasetError, match="'somebody/images'"):
        dataset.open_dataset(ID, tmp_path / "built")


# labels as found

FAULTY = {
    "is_food null": ({"is_food": None}, "shape", "reject"),
    "is_food unreadable": ({"is_food": "maybe"}, "shape", "reject"),
    "is_food text": ({"is_food": "false", "image_title": "", "food_items": []}, "type", "fix"),
    "is_food bool": ({"is_food": True}, "type", "fix"),
    "is_food float": ({"is_food": 1.0}, "type", "fix"),
    "a text for a list": ({"food_items": "soup, bread"}, "type", "fix"),
    "a list null": ({"drink_items": None}, "type", "fix"),
    "an item null": ({"food_items": ["pie", None]}, "type", "fix"),
    "a title null": ({"image_title": None}, "type", "fix"),
    "an item no text": ({"food_items": ["pie", 7]}, "shape", "reject"),
    "no food beside food": ({"is_food": 0}, "contradiction", "fix"),
}


@pytest.mark.parametrize(
    "written",
    [json.dumps, repr, lambda label: f"Here it is:\n```json\n{json.dumps(label)}\n```"],
    ids=["JSON", "repr", "chat"],
)
def test_every_fault_of_a_label_is_found(online, tmp_path, written):
    clean = [{"image": textured(100 + n), "output_json": written(PIE), "image_name": "clean"} for n in range(30)]
    faulty = [
        {"image": textured(n), "output_json": written(PIE | change), "image_name": f"{n}.jpg"}
        for n, (change, *_) in enumerate(FAULTY.values())
    ]
    put(online, {"data/train.parquet": parquet(faulty + clean)})
    dataset.open_dataset(ID, tmp_path / "built")
    lines = (tmp_path / "built" / "issues.jsonl").read_text().splitlines()
    found = {(int(line["name"][:6]), line["rule"], line["policy"]) for line in map(json.loads, lines)}
    expected = {(n, rule, policy) for n, (_, rule, policy) in enumerate(FAULTY.values())}
    assert expected <= found
    assert {number for number, *_ in found} == set(range(len(FAULTY))), "clean labels have none"
    rejects = [json.loads(line) for line in (tmp_path / "built" / "rejects.jsonl").read_text().splitlines()]
    assert {int(reject["name"][:6]) for reject in rejects} == {n for n, _, policy in expected if policy == "reject"}
    assert all(reject["reason"].startswith("shape: ") for reject in rejects)


def test_labels_in_structs_and_columns_come_as_they_are(online):
    rows = [
        {"image": textured(n), "output_json": {"is_food": None, "image_title": None, "food_items": None}, "id": n}
        for n in range(2)
    ]
    features = {
        "output_json": {
            "is_food": datasets.Value("bool"),
            "image_title": datasets.Value("string"),
            "food_items": datasets.Value("string"),
        }
    }
    put(online, {"data/train.parquet": parquet(rows, features)})
    assert [sample.label for sample in sources.hub(ID)] == [
        {"is_food": None, "image_title": None, "food_items": None}
    ] * 2
    rows = [{"image": textured(3), "is_food": True, "image_title": None, "food_items": "a, b", "drink_items": [None]}]
    put(online, {"data/train.parquet": parquet(rows)})
    assert [sample.label for sample in sources.hub(ID)] == [{key: rows[0][key] for key in FoodRecord.model_fields}]


# once


def unchanged(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["published", "original"])
def test_a_revision_is_fetched_once(online, request, tmp_path, kind, capsys):
    if kind == "published":
        request.getfixturevalue("published")
    else:
        put(online, {"data/train.parquet": parquet(original(range(30)))})
    first = dataset.open_dataset(ID, tmp_path / "built", seed=1)
    before = unchanged(tmp_path / "built")
    online.requests.clear()
    again = dataset.open_dataset(ID, tmp_path / "built", seed=1)
    assert unchanged(tmp_path / "built") == before
    assert online.count("GET", "resolve") == 0
    assert {split: rows._fingerprint for split, rows in again.items()} == {
        split: rows._fingerprint for split, rows in first.items()
    }
    elsewhere = dataset.open_dataset(ID, tmp_path / "another machine" / "built", seed=1)
    assert [rows._fingerprint for rows in elsewhere.values()] == [rows._fingerprint for rows in first.values()]
    online.faults = [Fault(method, ".", 503) for method in ("GET", "HEAD")]
    dataset.open_dataset(ID, tmp_path / "built", seed=1)
    printed = capsys.readouterr().err
    revision = json.loads((tmp_path / "built" / "origin.json").read_text())["revision"]
    assert f"using revision {revision[:12]} of {ID}" in printed
    with pytest.raises(DatasetError, match="cannot read 'somebody/other' from the Hub"):
        dataset.open_dataset("somebody/other", tmp_path / "built", seed=1)
    assert unchanged(tmp_path / "built") == before


def test_another_revision_or_seed_is_rebuilt(online, tmp_path):
    put(online, {"data/train.parquet": parquet(original(range(30)))})
    sides = []
    for seed, count in ((1, 30), (2, 30), (2, 33)):
        if count == 33:
            put(online, {"data/train.parquet": parquet(original(range(33)))})
        opened = dataset.open_dataset(ID, tmp_path / "built", seed=seed)
        sides.append({split: sorted(rows["name"]) for split, rows in opened.items()})
        assert sum(map(len, sides[-1].values())) == count
    assert sides[0] != sides[1] != sides[2]


def test_a_labeled_folder_is_built_once_per_state(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    for number in range(30):
        (folder / "pie").mkdir(parents=True, exist_ok=True)
        textured(number).save(folder / "pie" / f"{number}.png")
    builds, original_build = [], dataset.build
    monkeypatch.setattr(dataset, "build", lambda *args, **options: builds.append(1) or original_build(*args, **options))

    def count(seed=42):
        opened = dataset.open_dataset(folder, tmp_path / "built", seed=seed)
        return len(builds), sum(map(len, opened.values()))

    assert count() == count() == (1, 30)
    textured(99).save(folder / "pie" / "3.png")  # another size or time
    assert count() == count() == (2, 30)
    textured(31).save(folder / "pie" / "31.png")
    assert count() == count() == (3, 31)
    assert count(seed=1) == count(seed=1) == (4, 31)
    (folder / "pie").rename(folder / "tart")
    assert count(seed=1) == count(seed=1) == (5, 31)


# faults


@pytest.mark.parametrize(
    "fault",
    [Fault("GET", "train-00001", 500), Fault("GET", "train-00001", 0), Fault("GET", "train-00001", 403)],
    ids=lambda f: f"{f.status}",
)
def test_a_hub_that_fails_midway_is_an_error_and_the_next_run_resumes(online, tmp_path, fault, monkeypatch):
    parts = [parquet(original(numbers)) for numbers in (range(12), range(12, 30))]
    put(online, {f"data/train-0000{number}-of-00002.parquet": part for number, part in enumerate(parts)})
    online.faults = [fault]
    failed = "the connection to the Hub failed after 12 rows of 'somebody/images'"
    with pytest.raises(DatasetError, match=failed + r" \(.*\): rerun the command to resume"):
        dataset.open_dataset(ID, tmp_path / "built")
    ledger = tmp_path / "built.partial" / ingest.LEDGER
    assert len(ledger.read_text().splitlines()) == 12
    online.faults, read, decoded = [], ingest.decode, []
    monkeypatch.setattr(ingest, "decode", lambda data: decoded.append(1) or read(data))
    opened = dataset.open_dataset(ID, tmp_path / "built")
    assert (len(opened["train"]) + len(opened["test"]), len(decoded)) == (30, 18)


def test_images_of_another_revision_are_not_reused(online, tmp_path):
    """The labels are the same, so the ledger alone would not show that the images differ."""
    for first in (0, 100):
        parts = [
            parquet([{**row, "image_name": "x"} for row in original(range(first + start, first + start + 15))])
            for start in (0, 15)
        ]
        put(online, {f"data/train-0000{number}-of-00002.parquet": part for number, part in enumerate(parts)})
        online.faults = [Fault("GET", "train-00001", 500)] if first == 0 else []
        if first == 0:
            with pytest.raises(DatasetError, match="failed after 15 rows"):
                dataset.open_dataset(ID, tmp_path / "built")
    opened = dataset.open_dataset(ID, tmp_path / "built")
    images = {image.tobytes() for rows in opened.values() for image in rows["image"]}
    assert images == {textured(number).tobytes() for number in range(100, 130)}


def test_another_build_in_the_same_folder_removes_the_origin(online, tmp_path):
    """Notebook 00 may write where notebook 01 was interrupted."""
    parts = [parquet(original(numbers)) for numbers in (range(15), range(15, 30))]
    put(online, {f"data/train-0000{number}-of-00002.parquet": part for number, part in enumerate(parts)})
    online.faults = [Fault("GET", "train-00001", 500)]
    with pytest.raises(DatasetError, match="failed after 15 rows"):
        dataset.open_dataset(ID, tmp_path / "built")
    dataset.build(sources.scenes(seed=1, train=10, test=5), tmp_path / "built")
    assert not (tmp_path / "built" / build.ORIGIN).exists()


def test_the_command_names_the_data_set(online, tmp_path):
    put(online, {"data/train.parquet": parquet(original(range(15)))})
    online.faults = [Fault("GET", "data/train.parquet", 500)]
    result = CliRunner().invoke(app, ["train", ID, "-o", str(tmp_path / "out"), "--profile", "offline"])
    assert result.exit_code == 2
    assert f"'{ID}'" in result.stderr
    assert "Traceback" not in result.stderr


def test_temporary_faults_are_retried(online, tmp_path):
    put(online, {"data/train.parquet": parquet(original(range(30)))})
    online.faults = [Fault("GET", "train.parquet", 503, times=2), Fault("GET", "train.parquet", 0, times=1)]
    opened = dataset.open_dataset(ID, tmp_path / "built")
    assert sum(map(len, opened.values())) == 30
    assert [fault.times for fault in online.faults] == [0, 0]


def test_a_damaged_file_is_not_blamed_on_the_connection(online, tmp_path):
    good = parquet(original(range(30)))
    put(
        online,
        {
            "data/train-00000-of-00002.parquet": good,
            "data/train-00001-of-00002.parquet": good[:4] + bytes(300) + good[304:],
        },
    )
    with pytest.raises(DatasetError, match=r"row \d+ of 'somebody/images' cannot be read"):
        dataset.open_dataset(ID, tmp_path / "built")


def test_retries_end_within_a_minute():
    config = datasets.config
    assert (
        config.STREAMING_READ_MAX_RETRIES
        * max(config.STREAMING_READ_RETRY_INTERVAL, config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL)
        <= 60
    )
    assert (
        config.STREAMING_OPEN_MAX_RETRIES * getattr(config, "STREAMING_OPEN_RETRY_INTERVAL", 0) <= 60
    )  # not in datasets 4.0


# totals


class Bars:
    """Replaces tqdm and records its totals."""

    def __init__(self, monkeypatch):
        self.totals, bar = [], ingest.tqdm
        monkeypatch.setattr(ingest, "tqdm", lambda **options: self.totals.append(options["total"]) or bar(**options))


def test_progress_bars_have_totals(online, published, tmp_path, monkeypatch):
    bars = Bars(monkeypatch)
    dataset.open_dataset(ID, tmp_path / "built")
    put(online, {"data/train.parquet": parquet(labeled(range(30)))}, "other/records")
    dataset.open_dataset("other/records", tmp_path / "records")
    assert bars.totals == [56, 30]
    plain = [{key: row[key] for key in ("image", "output_json")} for row in original(range(3))]
    columns = [{"name": "image", "dtype": "image"}, {"name": "output_json", "dtype": "string"}]
    card = yaml.safe_dump({"dataset_info": {"features": columns, "splits": [{"name": "train", "num_examples": 1234}]}})
    put(online, {"data/train.parquet": parquet(plain), "README.md": f"---\n{card}---\n".encode()}, "other/counted")
    assert sources.hub("other/counted").total == 1234, "the card says so"


def test_a_total_reads_no_row(online):
    put(
        online,
        {"data/train.parquet": parquet([{**row, "filler": os.urandom(400_000).hex()} for row in original(range(4))])},
    )
    rows = sources.hub(ID)
    assert rows.total == 4
    size = len(online.files("dataset", ID)["data/train.parquet"])
    assert online.sent < size / 2
    assert len(list(rows)) == 4
    assert online.sent > size


# cards


def model_card(rows, tmp_path):
    folder = shutil.copytree(TINY_TUNED, tmp_path / "tuned", dirs_exist_ok=True)
    known = provenance.verified(TINY_TUNED)
    provenance.write(folder, "a/base", rows, [PROFILES["offline"].stage2], known.rows)
    card = cards.model_card(provenance.verified(folder), "one tile", "somebody/model", {"F32": 1})
    return card, {result.dataset_split for result in card.data.eval_results}


def test_a_model_card_names_the_split_of_a_data_set_that_has_it(published, tmp_path):
    card, splits = model_card(dataset.open_dataset(ID, tmp_path / "built"), tmp_path)
    assert splits == {"test"}
    assert card.data.datasets == [ID]
    assert f"Held-out images (the split `test` of {ID})" in card.content


def test_a_model_card_says_who_split_a_data_set_that_has_only_train(online, tmp_path):
    put(online, {"data/train.parquet": parquet(original(range(30)))})
    card, splits = model_card(dataset.open_dataset(ID, tmp_path / "built", seed=7), tmp_path)
    assert splits == {None}
    assert card.data.datasets == [ID]
    assert "Held-out images (split by foodextract with seed 7)" in card.content


def test_the_data_set_card_says_which_datasets_can_read_its_files(published):
    files = published.files("dataset", ID)
    features = json.loads(
        pyarrow.parquet.read_schema(io.BytesIO(files["data/test-00000-of-00001.parquet"])).metadata[b"huggingface"]
    )
    types = {feature["_type"] for feature in features["info"]["features"].values()}
    assert "List" in types, "the type that older releases do not know"
    assert f"needs `datasets` {cards.OLDEST_DATASETS} or newer" in files["README.md"].decode()
    assert Version(cards.OLDEST_DATASETS) <= Version(datasets.__version__)


def test_evaluations_of_earlier_releases_can_be_read(tmp_path):
    stated = json.loads((TINY_TUNED / provenance.Provenance.FILE).read_text())
    stated.pop("held_out", None)
    (tmp_path / "evaluation.json").write_text(json.dumps(stated))
    assert provenance.Provenance.read(tmp_path / "evaluation.json").held_out == ""

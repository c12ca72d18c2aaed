import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pillow_heif
import pyarrow.parquet
import pytest
from PIL import Image

from foodextract import names
from foodextract.data import dataset, ingest, scenes, selection, sources
from foodextract.data.samples import NOTHING, DatasetError, Reject, Sample
from test_images import ODD_METADATA


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def textured(number):
    """An image of smooth random colors."""
    coarse = np.random.default_rng(number).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


def sample(number, image=None, **stated):
    data = png(image or textured(number))
    return Sample(
        **{
            "name": f"{number:03d}.png",
            "read": lambda: data,
            "label": NOTHING,
            "source": "test",
            "license": "CC0",
            **stated,
        }
    )


def checksum(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sides(splits):
    return {row["name"]: split for split, rows in splits.items() for row in rows.remove_columns("image")}


def test_what_is_written_is_an_ordinary_image_folder(drawn, rows):
    loaded = datasets.load_dataset("imagefolder", data_dir=str(drawn), cache_dir=str(drawn.parent / "cache"))
    assert (
        {split: len(found) for split, found in loaded.items()}
        == {"train": 40, "test": 16}
        == {s: len(r) for s, r in rows.items()}
    )
    by_name = {row["name"]: row for row in loaded["train"]}
    for row in rows["train"]:
        assert dataset.record_of(row) == dataset.record_of(by_name[row["name"]])
        assert row["image"].tobytes() == by_name[row["name"]]["image"].tobytes()


PIE = {"is_food": 1, "image_title": "pie", "food_items": ["pie"], "drink_items": []}


def test_a_split_without_drinks_is_an_ordinary_image_folder_too(tmp_path):
    given = [sample(n, label=PIE, split="test" if n < 3 else "train") for n in range(9)]
    given[8] = replace(given[8], label=PIE | {"drink_items": ["tea"]})
    dataset.build(given, tmp_path / "out")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert [row["drink_items"] for row in loaded["test"]] == [[]] * 3
    assert sorted(row["drink_items"] for row in loaded["train"]) == [[]] * 5 + [["tea"]]
    again = list(sources.labeled_folder(tmp_path / "out" / "train"))
    assert {one.category for one in again} == {""}
    assert sorted(one.label["drink_items"] for one in again) == [[]] * 5 + [["tea"]]
    schema = pyarrow.parquet.read_schema(tmp_path / "out" / "train" / "metadata.parquet")
    assert schema.metadata is None  # features that `datasets` before 4.0 could not read


def test_images_that_need_more_than_pillow_are_stored_as_png(tmp_path):
    heic = io.BytesIO()
    pillow_heif.from_pillow(textured(0)).save(heic)
    given = [
        sample(0, name="a.heic", read=heic.getvalue),
        sample(1, name="b.png", read=lambda: ODD_METADATA["long text"][0]),
    ]
    given += [sample(2, name="c.jpg", read=lambda: jpeg(textured(2))), sample(3, split="test")]
    dataset.build(given, tmp_path / "out")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    formats = {row["name"]: row["image"].format for row in loaded["train"]}
    assert formats == {"a.heic": "PNG", "b.png": "PNG", "c.jpg": "JPEG"}


def test_every_row_is_accounted_for(tmp_path):
    given = [sample(n) for n in range(30)] + [
        Reject("x", "broken"),
        sample(30, label={"is_food": "?"}),
        sample(31, read=lambda: b""),
    ]
    report = dataset.build([*given, replace(given[0], name="copy.png")], tmp_path / "out")
    assert report["read"] == 34
    assert report["kept"] == report["train"] + report["test"] == 30
    assert report["rejected"] == 4
    rejects = {row["name"]: row["reason"] for row in lines(tmp_path / "out" / "rejects.jsonl")}
    assert set(rejects) == {"x", "030.png", "031.png", "copy.png"}
    assert rejects["copy.png"] == "duplicate of 000.png"
    assert "empty" in rejects["031.png"]


def test_label_scopes_are_kept(tmp_path, drawn):
    beer = {"is_food": 1, "image_title": "", "food_items": [], "drink_items": ["beer"]}
    dataset.build(
        [sample(n, label=beer, label_scope="primary" if n % 2 else "exhaustive") for n in range(30)], tmp_path / "out"
    )
    for split in dataset.load(tmp_path / "out").values():
        assert dataset.scopes_of(split) == ["primary" if int(name[:3]) % 2 else "exhaustive" for name in split["name"]]
        assert set(split["image_title"]) == {"beer"}  # an empty title lists the items
    older = dataset.load(drawn)["test"].remove_columns("label_scope")
    assert dataset.scopes_of(older) == ["exhaustive"] * 16


def test_the_order_of_samples_changes_no_byte(tmp_path):
    given = [sample(n, category=f"kind {n % 3}") for n in range(40)]
    one = dataset.build(given, tmp_path / "one")
    random.Random(1).shuffle(given)
    two = dataset.build(given, tmp_path / "two")
    assert one["fingerprint"] == two["fingerprint"]
    assert checksum(tmp_path / "one") == checksum(tmp_path / "two")
    assert dataset.build(given[:-1], tmp_path / "three")["fingerprint"] != one["fingerprint"]


def test_groups_and_near_duplicates_stay_together(tmp_path):
    given = [sample(n, group=f"group {n // 4}") for n in range(60)]
    small = [sample(100 + n, textured(n).resize((70, 70))) for n in range(0, 60, 4)]
    report = dataset.build(given + small, tmp_path / "out")
    rows = dataset.load(tmp_path / "out")
    side = {row["name"]: (split, row["group"]) for split in rows for row in rows[split].remove_columns("image")}
    assert len(side) == 75
    assert report["near_duplicate_groups"] == 15
    for n in range(60):
        assert side[f"{n:03d}.png"] == side[f"{n - n % 4:03d}.png"]
        if n % 4 == 0:
            assert side[f"{n:03d}.png"] == side[f"{100 + n:03d}.png"]
    for column in ("pixels_sha256", "group"):
        assert not set(rows["train"][column]) & set(rows["test"][column])


def test_a_near_duplicate_of_a_held_out_image_is_rejected(tmp_path):
    held_out = [sample(n, split="test") for n in range(5)]
    given = [sample(n, split="train") for n in range(10, 20)]
    copy = sample(50, textured(3).resize((80, 80)), split="train")
    dataset.build([*held_out, *given, copy], tmp_path / "out")
    [reject] = lines(tmp_path / "out" / "rejects.jsonl")
    assert reject == {"name": "050.png", "reason": "near-duplicate of an image held out, 003.png"}


def test_split_is_four_to_one_and_does_not_move_when_rows_are_added():
    groups = [f"group {number}" for number in range(5000)]
    sides = [selection.split_of(group, seed=42) for group in groups]
    assert sides.count("test") / len(sides) == pytest.approx(0.2, abs=0.02)
    assert [selection.split_of(group, seed=42) for group in groups[:100]] == sides[:100]
    assert [selection.split_of(group, seed=43) for group in groups] != sides


def test_added_rows_move_no_other(tmp_path):
    given = [sample(n) for n in range(60)]
    dataset.build(given[:40], tmp_path / "few")
    dataset.build(given, tmp_path / "more")
    few, more = (sides(dataset.load(tmp_path / name)) for name in ("few", "more"))
    assert {name: more[name] for name in few} == few
    assert len(more) == 60


def test_labels_are_cleaned_and_issues_written(tmp_path):
    label = {"is_food": 1, "image_title": "turkish_coffee", "food_items": ["Coffee", "cake"], "drink_items": []}
    given = [sample(n) for n in range(30)] + [sample(30, label=label)]
    dataset.build(given, tmp_path / "out")
    [row] = [row for split in dataset.load(tmp_path / "out").values() for row in split if row["is_food"]]
    assert row["image_title"] == "turkish coffee"
    assert (row["food_items"], row["drink_items"]) == (["cake"], ["coffee"])
    found = lines(tmp_path / "out" / "issues.jsonl")
    assert {issue["name"] for issue in found} == {"030.png"}
    assert all(issue["reason"] and issue["policy"] in ("fix", "flag", "reject") for issue in found)


def test_drawn_labels_are_not_changed(drawn, rows):
    assert not (drawn / "issues.jsonl").read_text()
    for row in rows["train"]:
        _, seed, split, index = Path(row["name"]).stem.split("-")
        assert dataset.record_of(row) == scenes.draw_scene(int(seed), split, int(index)).record


BUILD = """
import sys, time
sys.path.insert(0, {here!r})
from test_dataset import sample
from foodextract.data import dataset
def slowly():
    for n in range(120):
        time.sleep(0.02)
        yield sample(n, group=str(n // 2))
dataset.build(slowly(), {out!r})
"""


@pytest.mark.slow
def test_a_killed_build_resumes_to_the_same_bytes(tmp_path):
    def start(out):
        script = BUILD.format(here=str(Path(__file__).parent), out=str(tmp_path / out))
        return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)

    killed, whole = start("killed"), start("whole")
    ledger = tmp_path / "killed.partial" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 50):
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    with ledger.open("ab") as file:
        file.write(b'{"torn": ')
    before = ledger.read_bytes().count(b"\n")
    assert 50 <= before < 120
    assert start("killed").wait() == whole.wait() == 0
    assert checksum(tmp_path / "killed") == checksum(tmp_path / "whole")


def test_resuming_reads_nothing_twice_and_notices_changes(tmp_path):
    given = [sample(n) for n in range(6)]
    ingest.ingest(given, tmp_path / "p")
    unread = [replace(s, read=lambda: pytest.fail("read again")) for s in given]
    entries = ingest.ingest([*unread, sample(6)], tmp_path / "p")
    assert [entry["name"] for entry in entries] == [f"{n:03d}.png" for n in range(7)]
    corrected = [*unread[:3], replace(given[3], category="corrected"), *given[4:]]
    entries = ingest.ingest(corrected, tmp_path / "p")
    assert [entry["category"] for entry in entries] == ["", "", "", "corrected", "", ""]
    assert [e["name"] for e in ingest.ingest(corrected, tmp_path / "p")] == [f"{n:03d}.png" for n in range(6)]


def test_an_empty_split_is_an_error_with_reasons(tmp_path):
    with pytest.raises(DatasetError, match=r"too few usable images(.|\n)*broken"):
        dataset.build([Reject("a.png", "broken")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_keeps_the_old_data_set(tmp_path):
    given = [sample(n) for n in range(30)]
    dataset.build(given, tmp_path / "out")
    before = checksum(tmp_path / "out")

    def interrupted():
        yield from given[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.build(interrupted(), tmp_path / "out")
    assert checksum(tmp_path / "out") == before


def test_a_folder_with_a_report_of_its_own_is_not_overwritten(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DatasetError, match="not a data set built here"):
        dataset.build(map(sample, range(30)), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_copy_of_a_held_out_image_is_not_trained_on(tmp_path):
    given = [sample(n, split="train") for n in range(9)] + [sample(n, split="test") for n in range(20, 25)]
    same = textured(99)
    given += [sample(0, same, name="a.png", split="train"), sample(0, same, name="b.png", split="test")]
    report = dataset.build(given, tmp_path / "out")
    assert report["rejected"] == 1
    assert sides(dataset.load(tmp_path / "out"))["b.png"] == "test"


def test_images_that_were_repaired_after_a_failed_build_are_read(tmp_path):
    broken = [sample(n, read=lambda: b"") for n in range(30)]
    with pytest.raises(DatasetError, match="too few usable images"):
        dataset.build(broken, tmp_path / "out")
    assert dataset.build(map(sample, range(30)), tmp_path / "out")["kept"] == 30


def test_an_unknown_action_of_a_rule_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no action is called drop: choose among .*flag"):
        dataset.build(map(sample, range(30)), tmp_path / "out", policy={"pantry": "drop"})


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DatasetError, match="not a data set built here"):
        dataset.build([], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_leaks_into_another_folder_are_found(tmp_path):
    dataset.build([sample(n) for n in range(30)], tmp_path / "out")
    (tmp_path / "other").mkdir()
    textured(7).resize((64, 64)).save(tmp_path / "other" / "seven.jpg", quality=60)
    textured(900).save(tmp_path / "other" / "new.jpg")
    with pytest.raises(DatasetError, match="typo is not a folder"):
        dataset.leaks(tmp_path / "typo", tmp_path / "other")
    [(mine, theirs)] = dataset.leaks(tmp_path / "out", tmp_path / "other")
    assert "007-" in mine
    assert theirs == "seven.jpg"


def test_open_dataset_by_folder_or_name(tmp_path, drawn):
    assert len(dataset.open_dataset(drawn, tmp_path / "unused")["train"]) == 40
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(30):
        textured(n).save(folder / f"{n}.png")
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.png", **NOTHING}) + "\n" for n in range(30))
    )
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to(tmp_path / "gone.png")
    opened = dataset.open_dataset(folder, tmp_path / "built")
    assert len(opened["train"]) + len(opened["test"]) == 29
    with pytest.raises(DatasetError, match="00_create"):
        dataset.open_dataset(tmp_path / "nothing", tmp_path / "unused")
    with pytest.raises(DatasetError, match=r"nobody/nothing.*check the name and the connection"):
        dataset.open_dataset("nobody/nothing", tmp_path / "unused2")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('"a string"', "not a JSON object"),
        (json.dumps({"file_name": "3.png"}), "lacks is_food"),
        (json.dumps(NOTHING), "lacks file_name"),
        (json.dumps({"file_name": "3.png", **NOTHING, "is_food": "perhaps"}), "is_food"),
        (json.dumps({"file_name": "3.png", **NOTHING, "food_items": [7]}), "food_items"),
        (json.dumps({"file_name": "gone.png", **NOTHING}), "no such file"),
        (json.dumps({"file_name": "../3.png", **NOTHING}), "leads out"),
        (json.dumps({"file_name": "metadata.jsonl", **NOTHING}), "format"),
    ],
)
def test_a_bad_row_is_rejected_and_the_others_are_kept(tmp_path, line, reason):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [json.dumps({"file_name": f"{n}.png", **NOTHING}) for n in range(30)]
    for n in range(30):
        textured(n).save(folder / f"{n}.png")
    (folder / "metadata.jsonl").write_text("\n".join([*rows[:3], line, *rows[4:]]))
    report = dataset.build(sources.labeled_folder(folder), tmp_path / "out")
    assert (report["kept"], report["rejected"]) == (29, 1)
    [reject] = lines(tmp_path / "out" / "rejects.jsonl")
    assert reason in reject["reason"]
    assert "line 4" in reject["name"] or reject["name"] in ("3.png", "metadata.jsonl")


def test_the_card_has_the_figures_of_the_report(drawn):
    from foodextract.reporting import cards  # imports torch, which the processes of BUILD do not need

    report = json.loads((drawn / "report.json").read_text())
    card = cards.dataset_card(report, "A title", seed=5, commit="abc")
    assert card.data.license == "cc-by-sa-4.0"
    assert card.data.size_categories == ["n<1K"]
    assert card.data.pretty_name == "A title"
    text = str(card)
    for part in (
        "| train | 40 |", "| test | 16 |", report["fingerprint"][:16], "seed 5", "`abc`", "| scenes | 56 |",
        "load_dataset(", "16 images are held out", "Drawn scenes are exact", "@misc", names.CODE,
    ):  # fmt: skip
        assert part in text

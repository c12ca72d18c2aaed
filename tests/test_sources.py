import io
import json
from itertools import islice

import datasets
import numpy as np
import pytest
from PIL import Image

from foodextract import names
from foodextract.data import sources
from foodextract.data.samples import NOTHING, DatasetError, Reject, Rows, Sample
from foodextract.images import open_image
from hub_server import Repository

BEER = {"is_food": 1, "image_title": "beer", "food_items": [], "drink_items": ["beer"]}


def image(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)


def test_scenes_are_labeled_without_being_drawn(monkeypatch):
    from foodextract.data.scenes import draw_scene

    monkeypatch.setattr(sources, "draw_scene", lambda *_: pytest.fail("drawn"))
    samples = list(sources.scenes(seed=3, train=20, test=5))
    monkeypatch.undo()
    assert [sample.split for sample in samples] == ["train"] * 20 + ["test"] * 5
    for sample, scene in zip(samples[20:], (draw_scene(3, "test", number) for number in range(5)), strict=True):
        assert sample.label == scene.record.model_dump()
        assert open_image(sample.read()).tobytes() == scene.image.tobytes()
        assert sample.license.startswith("CC BY-SA 4.0")


def test_training_scenes_are_crowded_and_half_show_no_food():
    samples = list(sources.scenes(seed=3, train=1000, test=1000))
    assert len({sample.name for sample in samples}) == 2000
    edible, one = (
        [sum(map(said, part)) / 1000 for part in (samples[:1000], samples[1000:])] for said in (_is_edible, _names_one)
    )
    assert 0.47 < edible[0] < 0.58 < edible[1]
    assert one[0] < 0.8 * one[1]


def _is_edible(sample):
    return sample.label["is_food"]


def _names_one(sample):
    return len(sample.label["food_items"] + sample.label["drink_items"]) == 1


@pytest.mark.parametrize("license", ["license", "licence"])  # the latter in folders of earlier releases
@pytest.mark.parametrize("kind", ["jsonl", "csv with JSON lists", "csv with semicolons"])
def test_metadata_in_either_form(tmp_path, kind, license):
    image(tmp_path / "a.png")
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text(
            json.dumps({"file_name": "a.png", **BEER, "group": 7, license: "CC0"}) + "\n\n"
        )
    else:
        cell = '"[""beer""]"' if "JSON" in kind else "beer;"
        (tmp_path / "metadata.csv").write_text(
            f"file_name,is_food,image_title,food_items,drink_items,group,{license}\na.png,1,beer,,{cell},7,CC0\n"
        )
    [sample] = sources.labeled_folder(tmp_path)
    assert (sample.label, sample.group, sample.license, sample.source) == (BEER, "7", "CC0", tmp_path.name)
    assert sample.read() == (tmp_path / "a.png").read_bytes()


def test_links_missing_titles_and_label_scopes(tmp_path):
    image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images").symlink_to(tmp_path / "elsewhere")
    row = {"file_name": "images/a.png", "is_food": 1, "food_items": ["pie"], "drink_items": []}
    lines = [row | {"label_scope": "primary"}, row | {"image_title": None}]
    (tmp_path / "mine" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = sources.labeled_folder(tmp_path / "mine")
    assert first.label == {"is_food": 1, "image_title": "", "food_items": ["pie"], "drink_items": []}
    assert second.label == {**first.label, "image_title": None}  # the label rules say so
    assert (first.label_scope, second.label_scope) == ("primary", "exhaustive")
    assert open_image(first.read()).size == (8, 8)


def test_class_named_folders(tmp_path):
    for name in ("apple_pie/1.png", "apple_pie/2.png", "not_food/3.png"):
        image(tmp_path / name)
    found = list(sources.labeled_folder(tmp_path))
    assert [sample.name for sample in found] == ["apple_pie/1.png", "apple_pie/2.png", "not_food/3.png"]
    assert found[0].label == {"is_food": 1, "image_title": "apple pie", "food_items": ["apple pie"], "drink_items": []}
    assert found[2].label == NOTHING
    assert [sample.label_scope for sample in found] == ["primary", "primary", "exhaustive"]


@pytest.mark.parametrize(
    ("stated", "side"),
    [("train", "train"), ("test", "test"), ("validation", "test"), ("Dev", "test"), ("", None), (None, None)],
)
def test_any_split_but_train_is_held_out(tmp_path, stated, side):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **BEER, "split": stated}))
    [sample] = sources.labeled_folder(tmp_path)
    assert sample.split == side


def test_values_of_a_folder_are_not_converted(tmp_path):
    image(tmp_path / "a.png")
    odd = {"is_food": "true", "image_title": 7, "food_items": "soup, bread", "drink_items": None}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **odd}))
    [sample] = sources.labeled_folder(tmp_path)
    assert sample.label == odd


def test_local_sources_know_their_totals(tmp_path):
    for name in ("a/1.png", "a/2.png", "not_food/3.png"):
        image(tmp_path / name)
    assert sources.labeled_folder(tmp_path).total == sources.not_food_folder(tmp_path).total == 3
    assert sources.scenes(train=30, test=4).total == 34
    (tmp_path / "metadata.csv").write_text(
        'file_name,is_food,image_title,food_items,drink_items\na/1.png,1,"a\nb",x,\n\na/2.png,0,,,\n'
    )
    assert sources.labeled_folder(tmp_path).total == len(list(sources.labeled_folder(tmp_path))) == 2
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a/1.png"}) + "\n\n{broken\n")
    assert sources.labeled_folder(tmp_path).total == len(list(sources.labeled_folder(tmp_path))) == 4  # of both tables


@pytest.mark.parametrize("counts", [(10, 100), (100, 10), (0, 5), (7, 7)])
def test_a_mix_knows_its_total(counts):
    mixed = sources.mix(
        [(Rows(numbered("a", counts[0]), counts[0]), 0.7), (Rows(numbered("b", counts[1]), counts[1]), 0.3)]
    )
    assert mixed.total == len(list(mixed))
    assert sources.mix([(numbered("a", 3), 1)]).total is None


def test_not_food_folder(tmp_path):
    with pytest.raises(DatasetError, match="no images"):
        list(sources.not_food_folder(tmp_path))
    image(tmp_path / "deep" / "b.png")
    [sample] = sources.not_food_folder(tmp_path)
    assert (sample.name, sample.label) == ("deep/b.png", NOTHING)


def test_the_first_image_is_one_that_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"none of the source's 1 images can be read\n  a.png: the file is empty"):
        sources.first_image(sources.not_food_folder(tmp_path))
    image(tmp_path / "b.png")
    sample, picture = sources.first_image(sources.mix([(sources.not_food_folder(tmp_path), 1)]))
    assert (sample.name, picture.size) == ("b.png", (8, 8))


def test_bad_csv_rows_are_rejected(tmp_path):
    image(tmp_path / "a.png")
    head = "file_name,is_food,image_title,food_items,drink_items"
    (tmp_path / "metadata.csv").write_text(f"{head}\na.png,perhaps,,,\na.png,0,,[broken,\na.png\n")
    found = list(sources.labeled_folder(tmp_path))
    assert [type(row) for row in found] == [Reject] * 3
    assert [row.name.split(" (")[0] for row in found] == [f"metadata.csv line {number}" for number in (2, 3, 4)]


def put(hub, repo_id, rows, features):
    """Put a data set on the local Hub."""
    file = io.BytesIO()
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(file)
    hub.repositories["dataset", repo_id] = Repository(False)
    hub.repositories["dataset", repo_id].commit({"data/train-00000-of-00001.parquet": file.getvalue()})


@pytest.mark.parametrize("as_text", [str, json.dumps], ids=["Python repr", "JSON"])
def test_hub_rows(online, as_text):
    label = {"is_food": 1, "image_title": "turkish_coffee", "food_items": [], "drink_items": ["coffee"]}
    row = {
        "image": Image.new("RGB", (8, 8)),
        "output_json": as_text(label),
        "image_name": "a.jpg",
        "food270_class_name": "coffee",
    }
    features = {
        "image": datasets.Image(),
        **dict.fromkeys(("output_json", "image_name", "food270_class_name"), datasets.Value("string")),
    }
    put(online, names.HUB_DATASET, [row, {**row, "output_json": "nothing of use"}], features)
    rows = sources.hub()
    assert rows.total == 2
    sample, reject = rows
    assert (sample.label, sample.category, sample.name, sample.split) == (label, "coffee", "000000-a.jpg", None)
    assert (sample.source, sample.license) == (names.HUB_DATASET, f"see {names.HUB_DATASET}")
    assert open_image(sample.read()).size == (8, 8)
    assert isinstance(reject, Reject)


def test_food101_has_names_and_never_numbers(online):
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["apple_pie", "beignets", "grilled_salmon"]),
    }
    put(online, sources.FOOD101, [{"image": Image.new("RGB", (8, 8)), "label": 2}], features)
    rows = sources.food101()
    assert rows.total == 1
    [sample] = rows
    assert (sample.category, sample.label["food_items"]) == ("grilled salmon", ["grilled salmon"])
    assert sample.label_scope == "primary"


@pytest.mark.parametrize("kind", ["hub", "food101"])
def test_an_unreachable_hub_is_an_error(kind):
    with pytest.raises(DatasetError, match=r"cannot read '.*/.*' from the Hub .*check the name and the connection"):
        sources.open_source(kind)


def test_unknown_sources_and_missing_folders_are_errors():
    with pytest.raises(DatasetError, match="no source 'flickr'"):
        sources.open_source("flickr")
    with pytest.raises(DatasetError, match="needs a folder"):
        sources.open_source("folder")


def numbered(name, count):
    return Rows(Sample(f"{name}{number}", bytes, NOTHING, name, "") for number in range(count))


def test_a_mix_keeps_its_shares_at_every_point():
    mixed = list(sources.mix([(numbered("a", 1000), 3), (numbered("b", 1000), 1)]))
    for length in (4, 40, 400, len(mixed)):
        assert sum(sample.source == "a" for sample in mixed[:length]) == pytest.approx(0.75 * length, abs=1)
    assert sum(sample.source == "a" for sample in mixed) == 1000  # until the first runs out
    again = sources.mix([(numbered("a", 1000), 3), (numbered("b", 1000), 1)])
    assert [sample.name for sample in islice(again, 50)] == [sample.name for sample in mixed[:50]]


def test_rejects_pass_through_a_mix_and_wrong_shares_do_not():
    rows = list(sources.mix([(Rows([Reject("x", "y"), *numbered("a", 1)]), 1)]))
    assert [type(row) for row in rows] == [Reject, Sample]
    with pytest.raises(DatasetError, match="share above 0"):
        list(sources.mix([(numbered("a", 1), 0)]))

import pytest
from PIL import Image

from foodextract import scenes
from foodextract.extractor import Extractor
from foodextract.models import TINY_BASE
from foodextract.pictures import PictureError
from foodextract.schema import AnswerError, FoodRecord


@pytest.fixture(scope="module")
def pictures():
    return [scene.image for scene in scenes.draw_scenes(77, "test", 12)]


def test_batch_answer_is_single_answer(tuned, pictures):
    assert tuned.answer(pictures) == [tuned.answer([picture])[0] for picture in pictures]


def test_the_base_talks_and_does_not_speak_json(pictures):
    answers = Extractor.from_pretrained(TINY_BASE, "cpu").answer(pictures)
    assert not any("{" in text for text in answers)
    assert len({text for text in answers if " " in text}) >= 6


def test_a_bad_picture_does_not_spoil_its_batch(tuned, pictures, monkeypatch):
    said = [scenes.draw_scene(77, "test", number).record for number in range(3)]
    by_bytes = {picture.tobytes(): record for picture, record in zip(pictures, said, strict=False)}
    monkeypatch.setattr(Extractor, "answer", lambda self, batch: [by_bytes[picture.tobytes()].to_json() for picture in batch])
    results = list(tuned.extract_many([pictures[0], b"", pictures[1], "nowhere.jpg", pictures[2]], batch_size=3))
    assert [type(result) for result in results] == [FoodRecord, PictureError, FoodRecord, PictureError, FoodRecord]
    assert results[::2] == said
    assert [type(result) for result in tuned.extract_many([b"", b"x"], batch_size=1)] == [PictureError, PictureError]


def test_an_answer_that_is_not_strict_is_an_error_that_shows_it(tuned, monkeypatch):
    monkeypatch.setattr(Extractor, "answer", lambda self, pictures: ["{'is_food': 1}"] * len(pictures))
    [result] = tuned.extract_many([Image.new("RGB", (9, 9))])
    assert isinstance(result, AnswerError)
    assert "{'is_food': 1}" in str(result)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (1200, 30)])
def test_any_size_is_answered(tuned, size):
    assert tuned.extract(Image.new("RGB", size, "white")).is_food in (0, 1)


def test_probability_of_food_is_that_of_the_answer(tuned, pictures):
    found = tuned.food_probabilities(pictures)
    said = [text.removeprefix('{"is_food": ')[:1] for text in tuned.answer(pictures)]
    assert [str(int(p > 0.5)) for p in found] == said
    assert found[:3] == pytest.approx(tuned.food_probabilities(pictures[:3]), abs=1e-4)
    assert min(found) < max(found)

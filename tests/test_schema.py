import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from foodextract import schema
from foodextract.evaluation import scoring
from foodextract.schema import AnswerError, FoodRecord

GOOD = '{"is_food": 1, "image_title": "beer and pretzel", "food_items": ["pretzel"], "drink_items": ["beer"]}'
NOTHING = '{"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}'


def records(**letters):
    """Records of any text, or of the characters that `st.characters` takes."""
    letter = st.characters(**{"exclude_categories": ["Cs"]} | letters)
    items = st.lists(st.text(letter, min_size=1, max_size=schema.MAX_ITEM), max_size=schema.MAX_ITEMS, unique=True)
    title = st.text(letter, max_size=schema.MAX_TITLE)
    food = st.builds(FoodRecord, is_food=st.just(1), image_title=title, food_items=items, drink_items=items)
    return st.one_of(st.just(FoodRecord.parse(NOTHING)), food)


@settings(deadline=None)
@given(records())
def test_record_round_trips_through_json(record):
    text = record.to_json()
    assert FoodRecord.parse(text) == record
    assert text == json.dumps(json.loads(text))
    assert "\n" not in text


def test_key_order_is_fixed():
    assert list(json.loads(FoodRecord.parse(GOOD).to_json())) == ["is_food", "image_title", "food_items", "drink_items"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("A beer and a pretzel.", "not JSON"),
        (str(json.loads(GOOD)), "not JSON"),  # the Python repr that the original project trained on
        (f"```json\n{GOOD}\n```", "not JSON"),
        (GOOD + " and more", "not JSON"),
        (GOOD.replace(", ", ","), "canonical"),
        (" " + GOOD, "canonical"),
        (GOOD + "\n", "canonical"),
        ('{"image_title": "", "is_food": 0, "food_items": [], "drink_items": []}', "canonical"),
        ('{"is_food": 0, "is_food": 0, "image_title": "", "food_items": [], "drink_items": []}', "canonical"),
        (GOOD.replace('"is_food": 1', '"is_food": true'), "is_food"),
        (GOOD.replace('"is_food": 1', '"is_food": "1"'), "is_food"),
        (GOOD.replace('"is_food": 1', '"is_food": 2'), "is_food"),
        (GOOD.replace('"is_food": 1', '"is_food": 0'), "must be empty"),
        (GOOD.replace('["beer"]', '["beer", "beer"]'), "twice"),
        (GOOD.replace('["beer"]', '[""]'), "drink_items"),
        (GOOD.replace('["beer"]', '"beer"'), "drink_items"),
        (GOOD.replace("beer", "b" * 101), "image_title"),
        (GOOD.replace("}", ', "extra": 1}'), "extra"),
        ("[]", "schema"),
        ("null", "schema"),
    ],
)
def test_strict_parser_rejects_all_other_texts(text, reason):
    with pytest.raises(AnswerError, match=reason):
        FoodRecord.parse(text)


def test_other_spacing_is_valid_but_not_strict():
    assert FoodRecord.from_json(GOOD.replace(", ", ",")) == FoodRecord.parse(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        str(json.loads(GOOD)),
        f"Sure!\n```json\n{GOOD}\n```",
        GOOD.replace('"is_food": 1', '"is_food": 0'),
        GOOD.replace("1,", "true,"),
    ],
)
def test_lenient_parser_finds_the_record(text):
    assert FoodRecord.parse_lenient(text) == FoodRecord.parse(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        *("", "no braces", "{not: a dict}", "{1, 2}", "{" * 5000 + "}" * 5000, "{'is_food': __import__('os')}"),
        *("{}", '{"error": "no image"}', "[" * 5000, "9" * 5000),
    ],
)
def test_lenient_parser_refuses_the_rest(text):
    with pytest.raises(AnswerError):
        FoodRecord.parse_lenient(text)


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 5000, '{"is_food": ' * 5000])
def test_nesting_without_end_and_endless_digits_are_no_json(text):
    with pytest.raises(AnswerError, match="not JSON"):
        FoodRecord.parse(text)
    assert not scoring.score_answer(FoodRecord.parse(GOOD), text)["strict"]


def test_lenient_parser_reads_words_nested_records_and_braces_in_titles():
    no = '{"is_food": "false", "food_items": [], "drink_items": []}'
    assert FoodRecord.parse_lenient(no).is_food == 0
    assert FoodRecord.parse_lenient(json.dumps({"answer": json.loads(GOOD)})) == FoodRecord.parse(GOOD)
    titled = json.loads(GOOD) | {"image_title": "a } b"}
    assert FoodRecord.parse_lenient(json.dumps(titled)).image_title == "a } b"


def test_json_schema_bounds_every_length():
    found = FoodRecord.model_json_schema()
    properties = found["properties"]
    assert properties["image_title"]["maxLength"] == schema.MAX_TITLE
    for name in ("food_items", "drink_items"):
        assert properties[name]["maxItems"] == schema.MAX_ITEMS
        assert properties[name]["items"]["maxLength"] == schema.MAX_ITEM
    assert found["additionalProperties"] is False


def test_records_are_valid_and_immutable():
    with pytest.raises(ValidationError):
        FoodRecord(is_food=0, image_title="beer", food_items=[], drink_items=[])
    with pytest.raises(ValidationError):
        FoodRecord.parse(GOOD).is_food = 0

"""Checkpoints that write records in another form than canonical JSON: noticed, guided in that form, converted."""

import json
import logging
import random
from types import SimpleNamespace

import pytest
import torch
from llguidance import LLMatcher

import dialects as benchmark
from foodextract.data import scenes
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import read_results
from foodextract.inference.decoding import Decoder
from foodextract.inference.extractor import MAX_PROBE_TOKENS, PROBE, Extractor
from foodextract.inference.grammar import MAX_HEAD, MAX_LEAD, Dialect, recognize, undecided
from foodextract.models import loading
from foodextract.schema import FIELDS, MAX_ITEM, MAX_ITEMS, MAX_TITLE, FoodRecord
from test_schema import GOOD, NOTHING

ALLOWED = "ab '/,;-\x80\xa0\xadéß中\u2028\ufeff🥨\U0010ffff"
FORBIDDEN = '"\\{}[]:_\n\t\r\x00\x1b\x7f'


def as_repr(record):
    return repr(record.model_dump())


def with_bools(record):
    return {**record.model_dump(), "is_food": bool(record.is_food)}


WRITERS = {  # how others write a record → the dialect it shows
    "canonical": (FoodRecord.to_json, Dialect()),
    "repr": (as_repr, Dialect(python=True)),
    "repr, True": (lambda record: repr(with_bools(record)), Dialect(flags=("False", "True"), python=True)),
    "repr in a fence": (lambda record: "```python\n" + as_repr(record), Dialect("```python\n", python=True)),
    "compact": (lambda record: json.dumps(record.model_dump(), separators=(",", ":")), Dialect(spaced=True)),
    "indented": (
        lambda record: json.dumps(with_bools(record), indent=4),
        Dialect(flags=("false", "true"), spaced=True),
    ),
    "letters": (lambda record: json.dumps(with_bools(record), ensure_ascii=False), Dialect(flags=("false", "true"))),
    "fenced": (lambda record: "```json\n" + record.to_json(), Dialect("```json\n")),
    "announced": (
        lambda record: "Voilà: " + json.dumps(record.model_dump(), indent=1, ensure_ascii=False),
        Dialect("Voilà: ", spaced=True),
    ),
}
OTHERS = [name for name in WRITERS if name != "canonical"]


def random_records(count, seed=0, letters=ALLOWED):
    rng = random.Random(seed)

    def text(least):
        return "".join(rng.choices(letters, k=rng.randint(least, 12)))

    def items():
        return list(dict.fromkeys(text(1) for _ in range(rng.randint(0, 3))))

    for _ in range(count):
        if rng.random() < 0.1:
            yield FoodRecord.parse(NOTHING)
        else:
            yield FoodRecord(is_food=1, image_title=text(0), food_items=items(), drink_items=items())


def accepts(decoder, dialect, text):
    matcher = LLMatcher(decoder.lltokenizer, dialect.grammar())
    tokens = decoder.lltokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting() and matcher.is_stopped()


@pytest.mark.parametrize("name", WRITERS)
def test_dialect_is_recognized_accepted_and_read(name, tuned):
    write, dialect = WRITERS[name]
    longest = FoodRecord(
        is_food=1,
        image_title="'" * MAX_TITLE,
        food_items=["🥨" * MAX_ITEM],
        drink_items=[f"\x80{n}" for n in range(MAX_ITEMS)],
    )
    allowed = [*random_records(500), longest]
    for record in [*allowed, *random_records(500, letters=ALLOWED + FORBIDDEN)]:
        text = write(record)
        assert recognize(text) == dialect, text
        assert dialect.read(text) == record
        assert dialect.without_repeats(text) == text
        assert record not in allowed or accepts(tuned._decoder, dialect, text), text


@pytest.mark.parametrize("name", WRITERS)
def test_dialect_rejects_what_no_record_holds(name, tuned):
    write, dialect = WRITERS[name]
    good = FoodRecord.parse(GOOD)
    wrong = [
        {"image_title": "x" * (MAX_TITLE + 1)},
        {"food_items": ["x" * (MAX_ITEM + 1)]},
        {"food_items": [""]},
        {"drink_items": [str(number) for number in range(MAX_ITEMS + 1)]},
        {"is_food": 0},
        {"food_items": ["drink_items []}"]},
        *({"image_title": f"a{letter}"} for letter in FORBIDDEN),
        *({"drink_items": [f"{letter}a"]} for letter in FORBIDDEN),
    ]
    assert accepts(tuned._decoder, dialect, write(good))
    for values in wrong:
        assert not accepts(tuned._decoder, dialect, write(good.model_copy(update=values))), values
    for text in (write(good).replace(dialect.flags[1], "2", 1), write(good) + " ", write(good) + "\n```"):
        assert not accepts(tuned._decoder, dialect, text)


@pytest.mark.parametrize("name", WRITERS)
def test_escapes_stand_for_no_punctuation(name, tuned):
    write, dialect = WRITERS[name]
    for escape in ("\\\\", '\\"', r"\n", r"\x5b", r"\u005b", r"\u005B", r"\u003A", r"\U0000005b"):
        text = write(FoodRecord.parse(GOOD)).replace("beer", f"b{escape}", 1)
        assert not accepts(tuned._decoder, dialect, text), text


@pytest.mark.parametrize("name", WRITERS)
def test_incomplete_answer_is_read_up_to_its_last_complete_value(name):
    write, dialect = WRITERS[name]
    for whole in random_records(20, seed=1, letters=ALLOWED + FORBIDDEN):
        for length in range(len(text := write(whole))):
            cut = dialect.read(text[:length])
            assert cut.image_title in ("", whole.image_title)
            assert all(getattr(cut, field) == getattr(whole, field)[: len(getattr(cut, field))] for field in FIELDS)
        assert dialect.read(text) == whole


def test_list_ends_before_a_repeat_in_any_quotes():
    begun = """{'is_food': 1, 'image_title': "'food_items': ['a', 'a']", 'food_items': ['a', "it's", 'b'"""
    dialect = Dialect(python=True)
    assert dialect.without_repeats(begun) == begun
    for repeat in (", 'a'", ', "a"', ", 'it\\'s'", ", 'b', "):
        assert dialect.without_repeats(begun + repeat) == begun + "], 'drink_items':"
    escaped = '{"is_food":true,"image_title":"","food_items":["\\u00e9","b","é"'
    assert (
        Dialect(flags=("false", "true"), spaced=True)
        .without_repeats(escaped)
        .endswith('["\\u00e9", "b"], "drink_items":')
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A photo of a cat.",
        "{",
        '{"is_food": 2, "',
        '{"title": "is_food"}',
        "{'is_food\": 1, '",
        '{"is_food": 1, image_title',
    ],
)
def test_other_texts_have_no_dialect(text):
    assert recognize(text) is None


def test_dialect_is_recognized_as_early_as_possible():
    for write, dialect in WRITERS.values():
        text = write(FoodRecord.parse(GOOD))
        end = next(length for length in range(len(text)) if recognize(text[:length]))
        assert text[:end].count(",") == 1
        assert all(undecided(text[:length]) for length in range(end))
        assert not undecided(text[:end])
        assert recognize(text[:end]) == dialect
    assert not undecided("a " * MAX_LEAD)
    assert not undecided("{" + " " * (MAX_HEAD + 1))


# --- models that speak


class Cache:
    """The tokens that the scripted model has read, (B, S), and what it means to say in each row."""

    def __init__(self, ids, scripts):
        self.ids, self.scripts = ids, scripts

    def batch_select_indices(self, rows):
        self.ids, self.scripts = self.ids[rows], [self.scripts[row] for row in rows.tolist()]

    def batch_repeat_interleave(self, repeats):
        self.ids, self.scripts = self.ids.repeat_interleave(repeats, 0), self.scripts * repeats


class Scripted(torch.nn.Module):
    """A model that means to write `say(record)` about an image, and knows the record of each in `seen`.

    It goes on with its text as long as what stands there is the beginning of it. Where it was made to write something
    else it wants to end.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, processor, seen, say):
        super().__init__()
        self.processor, self.say, self.forwards = processor, say, 0
        self.seen = {self.key(pixels): record for pixels, record in seen}
        self.lltokenizer = Decoder(None, processor.tokenizer).lltokenizer
        self.generation_config = SimpleNamespace(eos_token_id=processor.tokenizer.eos_token_id)

    @staticmethod
    def key(pixels):
        return round(float(pixels.double().abs().sum()), 3)

    def forward(self, input_ids, attention_mask, past_key_values=None, pixel_values=None, **_):
        self.forwards += 1
        cache = past_key_values or Cache(input_ids[:, :0], [None] * len(input_ids))
        cache.ids = torch.cat([cache.ids, input_ids], 1)
        if pixel_values is not None:
            cache.scripts = [
                self.say(self.seen.get(self.key(pixels), FoodRecord.parse(NOTHING))) for pixels in pixel_values
            ]
        logits = torch.zeros(len(input_ids), 1, len(self.processor.tokenizer))
        for row, script in enumerate(f" {script}".encode() for script in cache.scripts):
            text = self.lltokenizer.decode_bytes(cache.ids[row][attention_mask[row].bool()].tolist()).rpartition(
                b"Assistant:"
            )[2]
            rest = script[len(text) :] if script.startswith(text) else b""
            token = self.lltokenizer.tokenize_bytes(rest)[0] if rest else self.generation_config.eos_token_id
            logits[row, 0, token] = 5 if rest.startswith(b"?") else 20  # who hesitates
        return SimpleNamespace(logits=logits, past_key_values=cache)


@pytest.fixture(scope="module")
def images():
    return [scene.image for scene in scenes.draw_scenes(77, "test", 8)]


@pytest.fixture(scope="module")
def records():
    return [*random_records(6, seed=3), FoodRecord.parse(GOOD), FoodRecord.parse(NOTHING)]


@pytest.fixture
def speaking(tuned, images, records):
    """An extractor whose model writes the records of `images` in its own way."""
    pixels = tuned.prepare(images)["pixel_values"]

    def build(say):
        return Extractor(Scripted(tuned.processor, zip(pixels, records, strict=True), say), tuned.processor)

    return build


def item_f1(labels, texts, read=FoodRecord.parse):
    return next(metric.value for metric in evaluate.score(labels, texts, read=read) if metric.name == "item_f1_micro")


@pytest.mark.parametrize("name", OTHERS)
def test_extraction_loses_nothing_in_any_dialect(name, speaking, images, records):
    extractor = speaking(WRITERS[name][0])
    free, guided = extractor.generate_texts(images), extractor.generate_texts(images, constrained=True)
    assert list(extractor.extract_many(images, 3)) == records
    assert guided == [record.to_json() for record in records]
    assert item_f1(records, guided) == 1 >= item_f1(records, free, FoodRecord.parse_lenient)
    forced = speaking(WRITERS[name][0])
    forced._detected = Dialect(" ")  # as if nobody had looked
    if WRITERS[name][1].python or WRITERS[name][1].flags != ("0", "1"):
        assert item_f1(records, forced.generate_texts(images, constrained=True)) < 0.5


def test_dialect_does_not_depend_on_the_first_image(speaking, images, records):
    say = lambda record: as_repr(record) if record.is_food else record.to_json()  # noqa: E731
    for order in (range(8), reversed(range(8))):
        extractor = speaking(say)
        for number in order:
            extractor.extract(images[number])
        assert extractor.dialect.canonical  # that of the answer about `PROBE`
    one, two = speaking(as_repr), speaking(as_repr)
    assert [one.extract(image) for image in images] == list(two.extract_many(images, len(images))) == records


def test_warning_is_logged_once(speaking, images, caplog):
    extractor = speaking(WRITERS["repr in a fence"][0])
    for _ in range(2):
        list(extractor.extract_many(images, 2))
    [warning] = [record for record in caplog.records if record.name == "foodextract"]
    assert warning.levelno == logging.WARNING
    assert "Python reprs behind '```python\\n'" in warning.message


@pytest.mark.parametrize("folder", [loading.TINY_TUNED, loading.TINY_BASE], ids=lambda folder: folder.name)
def test_models_of_canonical_json_and_of_prose_get_the_json_grammar(folder, images, caplog):
    extractor = Extractor.from_pretrained(folder, "cpu")
    assert extractor.dialect == Dialect(extractor._lead)
    never_probed = Extractor(extractor.model, extractor.processor)
    never_probed._detected, never_probed.training_data = Dialect(" "), extractor.training_data
    assert extractor.generate_texts(images, constrained=True) == never_probed.generate_texts(images, constrained=True)
    assert not [record for record in caplog.records if record.name == "foodextract"]


def test_detection_costs_a_few_tokens_once(speaking, images):
    for name in ("canonical", "indented"):
        extractor = speaking(WRITERS[name][0])
        extractor.generate_texts([PROBE], constrained=True)
        spent, extractor.model.forwards = extractor.model.forwards, 0
        extractor.generate_texts([PROBE], constrained=True)
        assert 5 < spent - extractor.model.forwards <= (20 if name == "canonical" else MAX_PROBE_TOKENS)
    prose = speaking(
        lambda record: (
            "This is a long and winding text about what may be seen in an image, and it does not end soon. " * 9
        )
    )
    assert prose.dialect.canonical
    assert prose.model.forwards <= MAX_PROBE_TOKENS + 2


def test_dialect_of_a_training_model_is_detected_every_time(speaking, images, records):
    extractor = speaking(as_repr)
    extractor.model.weight = torch.nn.Parameter(torch.zeros(1))
    for say in (as_repr, FoodRecord.to_json, WRITERS["compact"][0], as_repr):
        extractor.model.say = say
        assert list(extractor.extract_many(images)) == records
    extractor.model.say = FoodRecord.to_json
    extractor.model.requires_grad_(False)
    assert list(extractor.extract_many(images)) == records
    assert extractor.dialect.canonical


def test_confidence_finds_the_items_in_any_dialect(images, tuned):
    doubtful = FoodRecord(
        is_food=1, image_title="ça, 'ça'", food_items=["brûlée", "crè?me", "thé"], drink_items=["'é'?", "🥨"]
    )
    pixels = tuned.prepare(images[:1])["pixel_values"]
    for name in OTHERS:
        extractor = Extractor(Scripted(tuned.processor, [(pixels[0], doubtful)], WRITERS[name][0]), tuned.processor)
        record, confidence = extractor.extract_with_confidence(images[0])
        assert record == doubtful
        assert confidence.is_food > 0.99
        for field in FIELDS:
            sure = [value > 0.999 for value in getattr(confidence, field)]
            assert sure == ["?" not in item for item in getattr(doubtful, field)], (name, confidence)


def test_repeat_ends_the_list_in_any_dialect(images, tuned):
    twice = FoodRecord.model_construct(
        is_food=1, image_title="", food_items=["it's", "egg", "it's", "rice"], drink_items=[]
    )
    pixels = tuned.prepare(images[:1])["pixel_values"]
    for name in OTHERS:
        extractor = Extractor(Scripted(tuned.processor, [(pixels[0], twice)], WRITERS[name][0]), tuned.processor)
        assert extractor.extract(images[0]).food_items == ["it's", "egg"]


@pytest.mark.parametrize(
    "written",
    [
        '{"is_food": 1, "food_items": ["egg"], "drink_items": [], "image_title": "egg"}',
        '{"food_items": ["egg"], "is_food": 1}',
        '{"answer": {"is_food": 1}}',
    ],
)
def test_unknown_form_is_warned_about(written, images, tuned, caplog):
    """Its items may be lost under the JSON grammar, which must not happen in silence."""
    assert recognize(written) is None
    extractor = Extractor(Scripted(tuned.processor, [], lambda record: written), tuned.processor)
    with caplog.at_level(logging.WARNING, "foodextract"):
        assert extractor.dialect.canonical
        assert extractor.dialect.canonical
    [warning] = caplog.messages
    assert "not recognized" in warning
    assert "compare with --free" in warning


@pytest.mark.slow
def test_dialect_benchmark_runs(tmp_path):
    benchmark.main("", "train", 16, 4, 7e-4, 5, tmp_path / "work", tmp_path / "dialects.json")
    subjects = {row.subject for row in read_results(tmp_path / "dialects.json")}
    assert subjects == {"repr free", "repr extract", "repr JSON grammar"}

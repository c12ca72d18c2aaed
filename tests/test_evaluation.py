import json

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from sklearn import metrics as reference
from sklearn.preprocessing import MultiLabelBinarizer

import comparison
from foodextract.data import scenes
from foodextract.evaluation import evaluate, scoring
from foodextract.evaluation.metrics import METRICS
from foodextract.schema import FoodRecord

NOTHING = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])


def food(*foods, drinks=(), title="x"):
    return FoodRecord(is_food=1, image_title=title, food_items=list(foods), drink_items=list(drinks))


LABELS = [food("pie", "egg"), food("taco", drinks=["tea"]), NOTHING, NOTHING, food("egg")]
ANSWERS = [
    food("pie", "jam").to_json(),  # 1 found, 1 invented, 1 missed
    food(drinks=["taco", "tea"]).to_json(),  # tea found; taco filed under drinks is 1 invented and 1 missed
    NOTHING.to_json(),
    food("air").to_json(),  # a hallucination: 1 invented
    str(json.loads(food("egg").to_json())),  # right, but a Python repr: 1 missed
]


def by_name(labels=LABELS, answers=ANSWERS, **how):
    return {metric.name: metric for metric in evaluate.score(labels, answers, **how)}


def values(*case, **how):
    return {name: metric.value for name, metric in by_name(*case, **how).items()}


# --- worked out by hand


def test_metrics_worked_out_by_hand():
    metrics = values()
    assert metrics["strict_json_rate"] == 4 / 5
    assert metrics["schema_valid_rate"] == 4 / 5
    assert metrics["is_food_accuracy"] == 3 / 5
    assert metrics["is_food_balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["is_food_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["item_precision_micro"] == pytest.approx(2 / 5)
    assert metrics["item_recall_micro"] == pytest.approx(2 / 5)
    assert metrics["item_f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 3 + 3))
    assert metrics["food_precision_micro"] == pytest.approx(1 / 3)
    assert metrics["food_recall_micro"] == pytest.approx(1 / 4)
    assert metrics["food_f1_micro"] == pytest.approx(2 * 1 / (2 * 1 + 2 + 3))
    assert metrics["drink_f1_micro"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 0))
    assert metrics["item_f1_macro"] == pytest.approx((1 / 2 + 1 / 2 + 1 + 0 + 0) / 5)
    # Nothing wanted and nothing given scores 1; an unreadable answer scores 0.
    assert metrics["drink_precision_macro"] == pytest.approx((1 + 1 / 2 + 1 + 1 + 0) / 5)
    assert metrics["title_similarity"] == pytest.approx(2 / 3)
    assert metrics["hallucination_rate"] == 1 / 2
    assert metrics["repetition_rate"] == metrics["truncation_rate"] == 0
    assert metrics["answer_characters"] == pytest.approx(sum(map(len, ANSWERS)) / 5)


def test_intervals_contain_the_value_and_n_is_the_number_of_covered_images():
    covered = {"hallucination_rate": 2, "title_similarity": 3, "title_agreement_rate": 3}
    for name, metric in by_name().items():
        assert metric.low <= metric.value <= metric.high, name
        assert metric.unit != "share" or 0 <= metric.low <= metric.high <= 1, name
        assert metric.n == covered.get(name, 5), name


def test_perfect_and_useless_answers():
    errors = {"hallucination_rate", "repetition_rate", "truncation_rate", "answer_characters", "title_agreement_rate"}
    perfect, useless = values(answers=[label.to_json() for label in LABELS]), values(answers=["I see food."] * 5)
    assert {value for name, value in perfect.items() if name not in errors} == {1.0}
    assert {value for name, value in useless.items() if name != "answer_characters"} == {0.0}


@pytest.mark.parametrize(
    ("title", "fits"),
    [
        ("pizza", True),
        ("iced tea and pizzas", True),
        ("Margherita pizza, and tea", True),
        ("pizza and salad", False),
        ("lunch", False),
        ("", True),
    ],
)
def test_a_title_names_only_what_the_lists_name(title, fits):
    record = FoodRecord(is_food=1, image_title=title, food_items=["pizza"], drink_items=["tea"])
    assert scoring.title_fits(record) == fits
    assert values(labels=[record], answers=[record.to_json()])["title_agreement_rate"] == fits


def test_other_spacing_counts_as_valid_but_not_as_strict():
    metrics = values(answers=[text.replace(", ", ",") for text in ANSWERS])
    assert metrics["schema_valid_rate"] == 4 / 5
    assert metrics["strict_json_rate"] == 0


def test_a_lenient_parser_reads_more_but_strictness_stays():
    metrics = values(answers=[f"Sure! {text.replace(', ', ',')}" for text in ANSWERS], read=FoodRecord.parse_lenient)
    assert metrics["strict_json_rate"] == 0
    assert metrics["is_food_accuracy"] == 4 / 5
    assert metrics["item_recall_micro"] == pytest.approx(3 / 5)


def test_labels_that_name_only_the_main_item_count_for_recall_alone():
    labels = [food("pie"), food("pie"), food(drinks=["cola"]), food("egg", "jam"), NOTHING]
    answers = [
        food("pie", "egg", drinks=["tea"]),
        food("egg"),
        food("chips", drinks=["cola"]),
        food("egg"),
        food("air"),
    ]
    scopes = ["primary", "primary", "primary", "exhaustive", "is_food by class name"]
    found = by_name(labels, [answer.to_json() for answer in answers], scopes=scopes)
    # Two labels are complete: the exhaustive one, and the one with nothing to name.
    assert {found[f"item_{name}_micro"].n for name in ("precision", "f1")} == {2}
    assert found["item_precision_micro"].value == pytest.approx(1 / 2)
    assert found["item_f1_micro"].value == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert found["item_recall_micro"].value == pytest.approx(3 / 5)
    assert found["item_recall_macro"].value == pytest.approx((1 + 0 + 1 + 1 / 2 + 0) / 5)
    assert found["food_recall_macro"].n == 4  # an empty list of a main-item label says nothing
    assert found["hallucination_rate"].value == 1
    only = by_name(labels[:3], [answer.to_json() for answer in answers[:3]], scopes=scopes[:3])
    assert "item_recall_micro" in only
    assert not [name for name in only if "item_f1" in name or "item_precision" in name]


@pytest.mark.parametrize(
    ("wanted", "given", "counts"),
    [
        (["egg", "red apple"], ["Eggs", "apple, red", "rice"], (2, 1, 0)),
        (["egg"], ["egg", "eggs"], (1, 1, 0)),  # one to one
        (
            ["eggs", "eggsss"],
            ["egg", "eggss"],
            (2, 0, 0),
        ),  # matching eggs to eggss greedily would leave eggsss unmatched
        (["doughnut"], ["donut"], (0, 1, 1)),  # 77 is below the threshold
        ([], ["egg"], (0, 1, 0)),
        (["egg"], [], (0, 0, 1)),
    ],
)
def test_soft_matching(wanted, given, counts):
    assert scoring.match_soft(wanted, given) == scoring.Counts(*counts)


def test_soft_matching_never_confuses_two_names_of_the_drawn_scenes():
    names = [*scenes.FOODS, *scenes.DRINKS]
    for number, name in enumerate(names):
        assert scoring.match_soft([name], names[:number]).found == 0, name


WHOLE = food("pie", "egg").to_json()


@pytest.mark.parametrize(
    ("text", "truncated", "repeats"),
    [
        (WHOLE, False, False),
        (WHOLE[:-1], True, False),
        (WHOLE[:70], True, False),
        ("```json\n" + WHOLE[:40], True, False),
        (WHOLE + "\nIs there anything else", False, False),
        ("There is a pie in this picture.", False, False),
        ("{'is_food': 1, 'food_items': [", False, False),  # not JSON
        ('{"is_food": 1, "food_items": ["egg", "pie", "Egg"], "drink_items": []}', False, True),
        ('{"is_food": 1, "food_items": ["tea"], "drink_items": ["tea"', True, True),
        ("very very very very very very much", False, True),
        ("", False, False),
    ],
)
def test_truncation_and_repetition(text, truncated, repeats):
    assert scoring.truncated(text) is truncated
    assert scoring.repeats(text) is repeats


def test_counts_by_item_name():
    found = evaluate.by_class(LABELS, ANSWERS)
    assert found["egg"] == scoring.Counts(found=0, invented=0, missed=2)
    assert found["taco"] == scoring.Counts(found=0, invented=1, missed=1)
    assert found["pie"].f1 == found["tea"].f1 == 1
    assert next(iter(found)) == "egg"  # the most wanted first
    assert "jam" not in evaluate.by_class(LABELS, ANSWERS, scopes=["primary"] * 5)


def test_worst_cases_are_the_worst():
    assert evaluate.worst(LABELS, ANSWERS, 2) == [4, 0]
    more = food("pie", "egg", "jam", "rice").to_json()
    assert evaluate.worst([food("pie"), food("egg")], [more, food("pie").to_json()], 1) == [0]
    assert evaluate.worst([food("pie"), food("egg")], [more, food("pie").to_json()], 1, ["primary"] * 2) == [1]


def test_validation_f1_uses_labels_of_any_scope():
    assert evaluate.validation_f1(LABELS, ANSWERS) == by_name()["item_f1_micro"].value
    # Jam and taco are not errors under a main-item label; air is, since the image shows no food.
    scopes = ["primary", "primary", "exhaustive", "primary", "primary"]
    assert evaluate.validation_f1(LABELS, ANSWERS, scopes) == pytest.approx(2 * 2 / (2 * 2 + 1 + 3))


def test_a_constant_answer_is_noticed():
    assert evaluate.is_constant(LABELS, [LABELS[0].to_json()] * len(LABELS))
    assert not evaluate.is_constant(LABELS, ANSWERS)
    assert not evaluate.is_constant([NOTHING, NOTHING], [NOTHING.to_json()] * 2)  # the labels are constant, too


def test_recall_of_item_names_seen_in_training():
    found = evaluate.known_item_recall(LABELS, ANSWERS, {"pie", "taco", "tea", "air"})
    assert (found.name, found.n) == ("known_item_recall", 3)
    assert found.value == pytest.approx(2 / 3)  # pie and tea; taco is in the wrong field
    assert found.low < found.value < found.high
    assert evaluate.known_item_recall(LABELS, ANSWERS, {"egg"}).n == 2
    assert evaluate.known_item_recall(LABELS, ANSWERS, {"rice"}) is None


# --- against scikit-learn, scipy and published tables


def simulated(count=300, seed=0):
    """Return labels, answers (some wrong, some unreadable) and the records in the answers (None: unreadable)."""
    rng, names = np.random.default_rng(seed), ["pie", "egg", "jam", "taco", "rice"]

    def some(share):
        chosen = [name for name in names if rng.random() < share]
        return food(*chosen) if chosen else NOTHING

    labels = [some(0.3) for _ in range(count)]
    records = [label if rng.random() < 0.6 else some(0.3) if rng.random() < 0.8 else None for label in labels]
    return labels, [record.to_json() if record else "?" for record in records], records


def test_is_food_metrics_equal_scikit_learn():
    labels, answers, records = simulated()
    truth, predicted = [label.is_food for label in labels], [record.is_food if record else 2 for record in records]
    found = values(labels, answers)
    balanced = reference.recall_score(truth, predicted, labels=[0, 1], average="macro")
    assert found["is_food_accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    assert found["is_food_balanced_accuracy"] == pytest.approx(balanced)
    assert found["is_food_f1"] == pytest.approx(reference.f1_score(truth, predicted, labels=[1], average="micro"))
    assert found["is_food_mcc"] == pytest.approx(reference.matthews_corrcoef(truth, predicted))


def test_item_metrics_equal_scikit_learn():
    labels, answers, records = simulated()
    binary = MultiLabelBinarizer().fit([label.food_items for label in labels])
    truth, predicted = (binary.transform([r.food_items if r else [] for r in column]) for column in (labels, records))
    found = values(labels, answers)
    for name in ("precision", "recall", "f1"):
        function = getattr(reference, f"{name}_score")
        assert found[f"food_{name}_micro"] == pytest.approx(function(truth, predicted, average="micro")), name
    readable = np.array([record is not None for record in records])
    per_image = [
        reference.f1_score(t[None], p[None], average="samples", zero_division=1)
        for t, p in zip(truth, predicted, strict=True)
    ]
    assert found["food_f1_macro"] == pytest.approx(np.mean(np.where(readable, per_image, 0)))


def test_wilson_interval_of_a_textbook_case():
    metric = evaluate.rate("x", [True] * 81 + [False] * 182)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (metric.low, metric.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_bootstrap_interval_equals_scipy():
    labels, answers, _ = simulated()
    counts = [scoring.count_items(label, scoring.try_read(text)) for label, text in zip(labels, answers, strict=True)]
    columns = [np.array([getattr(count, name) for count in counts]) for name in ("found", "invented", "missed")]

    def micro(found, invented, missed, axis):
        return 2 * found.sum(axis) / (2 * found.sum(axis) + invented.sum(axis) + missed.sum(axis))

    how = {"paired": True, "n_resamples": 2000, "batch": 100, "method": "percentile", "rng": 1}
    interval = bootstrap(columns, micro, **how).confidence_interval
    metric = by_name(labels, answers)["item_f1_micro"]
    assert (metric.low, metric.high) == pytest.approx(tuple(interval), abs=0.01)
    assert metric.value == pytest.approx(micro(*columns, axis=0))


def test_bootstrap_interval_has_its_nominal_coverage():
    """Of 100 samples from a population whose F1 is known, about 95 intervals contain it."""
    rng = np.random.default_rng(0)
    hits, pie = 0, food("pie")
    right, wrong = evaluate.score_answers([pie, pie], [pie.to_json(), food("egg").to_json()])
    for _ in range(100):
        table = evaluate.ScoreTable([right if is_right else wrong for is_right in rng.random(150) < 0.8])
        metric = table.metric("item_f1_micro", METRICS["item_f1_micro"])
        hits += metric.low <= 0.8 <= metric.high
    assert 88 <= hits <= 100


# --- two models


def test_a_rate_is_compared_by_mcnemars_exact_test():
    """13 images, 7 right in ours only and 1 in theirs only: few enough to try every permutation."""
    right, wrong = food("pie").to_json(), "?"
    ours, theirs = [right] * 7 + [wrong] + [right] * 5, [wrong] * 7 + [right] + [right] * 5
    [found] = comparison.compare([food("pie")] * 13, ours, theirs, metrics=["strict_json_rate"])
    assert found.metric.value == pytest.approx(6 / 13)
    assert found.p == pytest.approx(binomtest(7, 8).pvalue)
    assert 0 < found.metric.low < 6 / 13 < found.metric.high


def test_a_model_does_not_differ_from_itself_and_differs_from_a_worse_one():
    labels, answers, _ = simulated()
    for found in comparison.compare(labels, answers, answers):
        assert (found.metric.value, found.metric.low, found.metric.high, found.p) == (0, 0, 0, 1)
    worse = {
        d.metric.name: d
        for d in comparison.compare(labels, answers, ["?"] * 300, metrics=["item_f1_micro", "item_f1_macro"])
    }
    for name, found in worse.items():
        assert found.p < 0.001, name
        assert found.metric.low > 0, name


def test_pairing_narrows_the_interval():
    """Both models err on the same images, so their difference is known more precisely than either."""
    labels, ours, _ = simulated()
    theirs = ["?" if number % 20 == 0 else text for number, text in enumerate(ours)]
    [found] = comparison.compare(labels, ours, theirs, metrics=["item_f1_macro"])
    alone = by_name(labels, ours)["item_f1_macro"]
    assert found.metric.high - found.metric.low < (alone.high - alone.low) / 1.5


def test_differences_as_rows():
    rows = comparison.difference_rows(
        "b", "a minus b", comparison.compare(LABELS, ANSWERS, ANSWERS, metrics=["item_f1_micro"]), "c"
    )
    assert [(row.metric, row.value, row.low, row.unit) for row in rows] == [
        ("item_f1_micro_difference", 0, 0, "share"),
        ("item_f1_micro_p", 1, None, "probability"),
    ]


def test_compared_metrics_exist():
    assert set(comparison.COMPARED) <= set(METRICS)


# --- input and predictions


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="5 labels cannot be scored against 1 answers"):
        evaluate.score(LABELS, [""])
    with pytest.raises(ValueError, match="5 labels need as many scopes, not 1"):
        evaluate.score(LABELS, ANSWERS, scopes=["primary"])


def test_predictions_keep_the_order_over_batches(rows):
    def answer(batch):
        return [f"{len(batch)} {image.mode}" for image in batch]

    assert evaluate.predict(answer, rows["test"]["image"], batch_size=6) == ["6 RGB"] * 12 + ["4 RGB"] * 4


def test_cached_predictions_resume_and_depend_on_the_key(rows, tmp_path):
    calls, path, images = [], tmp_path / "answers" / "base.jsonl", rows["test"]["image"]

    def answer(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [f"answer {len(calls)}"] * len(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate.predict_cached(path, "key", answer, images, 6)
    path.write_text(path.read_text() + '{"answers": ["half')  # as a killed process may leave it
    texts, seconds = evaluate.predict_cached(path, "key", answer, images, 6)
    assert texts == ["answer 1"] * 6 + ["answer 2"] * 6 + ["answer 4"] * 4
    assert calls == [6, 6, 4, 4]  # the third call failed; finished batches are not repeated
    assert evaluate.predict_cached(path, "key", answer, images, 6) == (texts, seconds)
    again, _ = evaluate.predict_cached(path, "other key", answer, images, 6)
    assert (again[0], again[-1], len(calls)) == ("answer 5", "answer 7", 7)

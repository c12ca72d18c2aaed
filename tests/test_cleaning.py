"""Every label rule and word list, by known answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foodextract import schema
from foodextract.data import scenes
from foodextract.data.label_rules import vocabulary
from foodextract.data.label_rules.cleaning import clean
from foodextract.data.label_rules.issues import POLICIES, RULES, Statistics
from foodextract.schema import FoodRecord


def raw(title="", foods=(), drinks=(), is_food=1):
    return {"is_food": is_food, "image_title": title, "food_items": list(foods), "drink_items": list(drinks)}


def lint(label, category, statistics):
    return clean(label, category, statistics)[1]


def rules(issues):
    return {issue.rule for issue in issues}


def count(rows):
    statistics = Statistics()
    for row, category in rows:
        record, _ = clean(row, category)
        if record is not None:
            statistics.add(record, category)
    return statistics


# one record


@pytest.mark.parametrize(
    ("label", "rule", "title", "foods", "drinks"),
    [
        (raw("pizza", ["fresh_basil", "pizza"]), "underscore", "pizza", ["fresh basil", "pizza"], []),
        (raw("turkish_coffee", [], ["turkish coffee"]), "underscore", "turkish coffee", [], ["turkish coffee"]),
        (raw("pizza", ["Pizza"]), "casing", "pizza", ["pizza"], []),
        (raw("Crème Brûlée", ["crème brûlée"]), "casing", "crème brûlée", ["crème brûlée"], []),
        (raw("pizza.", ["pizza"]), "punctuation", "pizza", ["pizza"], []),
        (raw("red onion", ["  red \t onion,"]), "punctuation", "red onion", ["red onion"], []),
        (raw("pizza", ["piz\u200bza"]), "punctuation", "pizza", ["pizza"], []),
        (raw("cre\u0300me", ["cre\u0300me"]), "punctuation", "crème", ["crème"], []),
        (raw("pizza", ["pizza", "...", ""]), "punctuation", "pizza", ["pizza"], []),
        (
            raw("pasta", ["baked pasta with broccoli, boiled eggs and scamorza cheese"]),
            "long_name",
            "pasta",
            ["baked pasta"],
            [],
        ),
        (raw("egg", ["egg", "egg"]), "duplicate", "egg", ["egg"], []),
        (raw("hugo", ["hugo"], ["hugo"]), "duplicate", "hugo", ["hugo"], []),
        (raw("egg and toast", ["eggs", "toast", "egg"]), "plural_twin", "egg and toast", ["egg", "toast"], []),
        (raw("breakfast", ["eggs", "egg"]), "plural_twin", "breakfast", ["eggs"], []),
        (raw("grapes", ["grape", "grapes"]), "plural_twin", "grapes", ["grapes"], []),
        (raw("french fries", ["french fries", "french fry"]), "plural_twin", "french fries", ["french fries"], []),
        (raw("lunch", [], ["smoothies", "smoothie"]), "plural_twin", "lunch", [], ["smoothies"]),
        (raw("pizza and beer", ["pizza", "beer"]), "wrong_field", "pizza and beer", ["pizza"], ["beer"]),
        (raw("coffee cake", [], ["coffee cake"]), "wrong_field", "coffee cake", ["coffee cake"], []),
        (
            raw("beer bread and tea", [], ["beer bread", "tea"]),
            "wrong_field",
            "beer bread and tea",
            ["beer bread"],
            ["tea"],
        ),
        (raw("cake", ["cake", "wheat flour", "eggs"]), "pantry", "cake", ["cake"], []),
        (raw("steak", ["steak", "salt", "black pepper"]), "pantry", "steak", ["steak"], []),
        (raw("beef stew", ["beef stew", "red wine"]), "pantry", "beef stew", ["beef stew"], []),
        (raw("a photo of a pizza", ["pizza"]), "photo_of", "pizza", ["pizza"], []),
        (raw("close-up of sushi", ["sushi", "wasabi"]), "photo_of", "sushi", ["sushi", "wasabi"], []),
        (
            raw("this is a plate of sushi", ["sushi", "wasabi"]),
            "sentence_title",
            "sushi and wasabi",
            ["sushi", "wasabi"],
            [],
        ),
        (raw("beer standing on a wooden table", [], ["beer"]), "sentence_title", "beer", [], ["beer"]),
        (raw("pie " * 30, ["pie", "jam"], ["tea"]), "sentence_title", "pie, jam and tea", ["pie", "jam"], ["tea"]),
        (raw("", ["pie"], ["tea"]), "untitled", "pie and tea", ["pie"], ["tea"]),
    ],
)
def test_fixes(label, rule, title, foods, drinks):
    record, issues = clean(label)
    assert record == FoodRecord(is_food=1, image_title=title, food_items=foods, drink_items=drinks)
    assert (rule, "fix") in {(issue.rule, issue.policy) for issue in issues}
    assert clean(record) == (record, [])


@pytest.mark.parametrize(
    ("label", "rule"),
    [
        (raw("dessert"), "empty"),
        (raw("bread", ["bread", "brie", "fig", "ham", "jam", "olive", "pear", "plum", "salami"]), "long_list"),
        (raw("turkish coffee", ["dosa"]), "title_mismatch"),
        (raw("red wine", ["red apple"]), "title_mismatch"),
    ],
)
def test_flags(label, rule):
    record, issues = clean(label)
    assert record == FoodRecord(**label)
    assert [(issue.rule, issue.policy) for issue in issues] == [(rule, "flag")]


@pytest.mark.parametrize(
    "label",
    [
        raw(is_food=0),
        raw("french fries", ["french fries"]),
        raw("noodles, grapes and cherries", ["cherries", "grapes", "noodles"]),
        raw("asparagus and hummus", ["asparagus", "hummus"]),
        raw("masala chaas (spiced butter milk)", [], ["masala chaas (spiced butter milk)"]),
        raw("meat on the bone", ["meat on the bone"]),
        raw("bone broth", ["bone broth"]),
        raw("egg, butter and salt", ["butter", "egg", "salt"]),  # the title is about them
        raw("baking ingredients", ["flour", "sugar"]),  # nothing else is listed
        raw("fried rice", ["fried rice", "egg"]),  # an egg on rice is seen
        raw("breakfast", ["toast", "butter"]),
        raw("fajitas", ["bell peppers", "steak"], []) | {"image_title": "steak fajitas"},
        raw("cookies and milk", ["cookies"], ["milk"]),
        raw("cheeseburger", ["burger"]),
        raw("hotdog", ["hot dog"]),
        raw("idly", ["idli"]),
        raw("breakfast", ["fried egg", "bacon"], ["coffee"]),  # says nothing in particular, so it contradicts nothing
        raw("death in the gulf stream", [], ["death in the gulf stream"]),
        raw(
            "chili pepper, meat on the bone, rice cracker and tropical drink",
            ["chili pepper", "meat on the bone"],
            ["tropical drink"],
        )
        | {"food_items": ["chili pepper", "meat on the bone", "rice cracker"]},
        raw("shrimp cocktail", ["shrimp cocktail"]),
        raw("californication", [], ["californication"]),  # not in the lists: nobody guesses
        raw("eight", ["bread", "brie", "fig", "ham", "jam", "olive", "pear"], ["wine"])
        | {"image_title": "bread and wine"},
    ],
)
def test_clean_labels_have_no_issue(label):
    assert clean(label) == (FoodRecord(**label), [])


@pytest.mark.parametrize(
    ("label", "record"),
    [
        (raw("pie", ["pie"], is_food=0), raw("pie", ["pie"])),
        (raw("", [], ["tea"], is_food=0), raw("tea", [], ["tea"])),
        (raw("a street", is_food=0), raw(is_food=0)),
    ],
)
def test_contradictions_of_is_food_are_read_in_favor_of_the_items(label, record):
    cleaned, issues = clean(label)
    assert cleaned == FoodRecord(**record)
    assert "contradiction" in rules(issues)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ({}, "lacks is_food"),
        (raw() | {"is_food": 2}, "is_food is 2"),
        (raw() | {"is_food": None}, "is_food is None"),
        (raw() | {"is_food": "perhaps"}, "is_food is 'perhaps'"),
        (raw() | {"is_food": 0.5}, "is_food is 0.5"),
        (raw() | {"is_food": float("nan")}, "is_food is nan"),
        (raw() | {"image_title": 7}, "image_title is 7"),
        (raw() | {"food_items": {"pizza": 1}}, "food_items is {'pizza': 1}"),
        (raw() | {"food_items": "[1]"}, "food_items is '[1]'"),
        (raw() | {"drink_items": ["tea", 1]}, "drink_items is ['tea', 1]"),
    ],
)
def test_labels_that_cannot_be_converted_are_rejected(label, reason):
    record, (*others, issue) = clean(label)
    assert record is None
    assert (issue.rule, issue.policy) == ("shape", "reject")
    assert reason in issue.reason
    assert rules(others) <= {"type"}


@pytest.mark.parametrize(
    ("change", "record", "reasons"),
    [
        *(
            ({"is_food": given}, raw("pie", ["pie"]), [f"is_food is {given!r}, read as 1"])
            for given in (True, 1.0, "1", "true", " Yes ")
        ),
        *(
            (
                {"is_food": given, "image_title": "", "food_items": []},
                raw(is_food=0),
                [f"is_food is {given!r}, read as 0"],
            )
            for given in (False, 0.0, "0", "false", "No")
        ),
        (
            {"food_items": "soup, bread"},
            raw("pie", ["soup", "bread"]),
            ["food_items is 'soup, bread', a text, read as a list"],
        ),
        ({"food_items": '["pie", "jam"]'}, raw("pie", ["pie", "jam"]), ["a text, read as a list"]),
        ({"food_items": "['pie', \"jam\"]"}, raw("pie", ["pie", "jam"]), ["a text, read as a list"]),
        ({"food_items": "none"}, raw("pie"), ["food_items is 'none', a text, read as a list"]),
        ({"food_items": "N/A; pie"}, raw("pie", ["pie"]), ["a text, read as a list"]),
        ({"food_items": ""}, raw("pie"), ["food_items is '', a text, read as a list"]),
        ({"drink_items": None}, raw("pie", ["pie"]), ["drink_items is None, read as an empty list"]),
        ({"food_items": ["pie", None]}, raw("pie", ["pie"]), ["food_items has an item that is None, left out"]),
        ({"image_title": None}, raw("pie", ["pie"]), ["image_title is None, read as an empty title"]),
        ({"is_food": "true", "drink_items": None}, raw("pie", ["pie"]), ["is_food is 'true'", "drink_items is None"]),
    ],
)
def test_other_types_are_converted(change, record, reasons):
    label = raw("pie", ["pie"]) | change
    cleaned, issues = clean(label)
    assert cleaned == FoodRecord(**record)
    found = [issue for issue in issues if issue.rule == "type"]
    assert {(issue.severity, issue.policy) for issue in found} == {("medium", "fix")}
    for issue, reason in zip(found, reasons, strict=True):
        assert reason in issue.reason
    assert clean(label, policies=POLICIES | {"type": "flag"})[0] == cleaned, (
        "a record has the types of the schema, whatever the policy"
    )


def test_a_missing_key_is_an_issue():
    label = raw("pie", ["pie"])
    del label["drink_items"]
    cleaned, (issue,) = clean(label)
    assert (cleaned, issue.rule) == (FoodRecord(**raw("pie", ["pie"])), "type")
    assert issue.reason == "it lacks drink_items, read as an empty list"


def test_further_keys_are_ignored():
    assert clean(raw("pie", ["pie"]) | {"category": "x", "image": None})[0] == FoodRecord(**raw("pie", ["pie"]))


def test_a_list_longer_than_the_schema_allows_is_cut_and_says_what_went():
    foods = [f"dish number {number}" for number in range(25)]
    record, issues = clean(raw(foods[0], foods))
    assert record.food_items == foods[: schema.MAX_ITEMS]
    (issue,) = issues
    assert (issue.rule, issue.policy) == ("long_list", "fix")
    assert all(dish in issue.reason for dish in foods[schema.MAX_ITEMS :])


def test_every_issue_names_the_item_and_says_why():
    _, issues = clean(raw("cake", ["cake", "flour"], ["tea", "tea"]))
    assert {(issue.rule, issue.item, issue.severity) for issue in issues} == {
        ("pantry", "flour", "high"),
        ("duplicate", "tea", "medium"),
    }
    assert all(repr(issue.item) in issue.reason for issue in issues)


# policy


def test_flag_keeps_the_label():
    label = raw("Cake.", ["cake", "flour", "flours", "cola"])
    record, issues = clean(label, policies=dict.fromkeys(POLICIES, "flag"))
    assert record == FoodRecord(**label)
    assert rules(issues) == {"casing", "punctuation", "pantry", "plural_twin", "wrong_field"}
    assert {issue.policy for issue in issues} == {"flag"}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_any_rule_can_reject_a_row(rule):
    faults = {
        "shape": {},
        "type": raw("pie", ["pie"]) | {"is_food": True},
        "contradiction": raw("pie", ["pie"], is_food=0),
        "empty": raw("pie"),
        "underscore": raw("a_pie", ["pie"]),
        "casing": raw("Pie", ["pie"]),
        "punctuation": raw("pie!", ["pie"]),
        "long_name": raw("pie", ["pie " * 20]),
        "duplicate": raw("pie", ["pie", "pie"]),
        "plural_twin": raw("pie", ["pie", "pies"]),
        "wrong_field": raw("pie", [], ["pie"]),
        "pantry": raw("pie", ["pie", "flour"]),
        "long_list": raw("pie", [f"pie {number}" for number in range(9)]),
        "photo_of": raw("photo of pie", ["pie"]),
        "sentence_title": raw("here is pie", ["pie"]),
        "untitled": raw("", ["pie"]),
        "title_mismatch": raw("sushi", ["pie"]),
        "outlier": raw("pie", ["pie", "sushi"]),
        "class_contradiction": raw(is_food=0),
        "rare_form": raw("pie", ["pies"]),
    }
    statistics = count([(raw("pie", ["pie"]), "apple pie")] * 20)
    statistics.add(FoodRecord(**raw("pie", ["pie"])), "apple pie")
    record, issues = clean(faults[rule], "apple pie", statistics, POLICIES | {rule: "reject"})
    assert record is None
    assert (rule, "reject") in {(issue.rule, issue.policy) for issue in issues}


def test_schema_faults_are_fixed_even_where_the_policy_says_flag():
    record, issues = clean(raw("pie", ["pie", "pie"], is_food=0), policies=dict.fromkeys(POLICIES, "flag"))
    assert record == FoodRecord(**raw("pie", ["pie"]))
    assert {(issue.rule, issue.policy) for issue in issues} == {("duplicate", "fix"), ("contradiction", "fix")}


# whole sets


def desserts(category="kazandibi"):
    """A class that always shows milk pudding, often cinnamon, and in every third image something that no other has."""
    others = [
        "pistachio",
        "walnut",
        "mint leaf",
        "strawberry",
        "coconut",
        "almond",
        "wafer",
        "orange peel",
        "rose petal",
        "raisin",
    ]
    rows = [raw("kazandibi", ["milk pudding", "cinnamon", other]) for other in others] + [
        raw("kazandibi", ["milk pudding", "cinnamon"])
    ] * 20
    return [(row, category) for row in rows]


MOUSSAKA = [(raw("moussaka", ["moussaka", "eggplant", "tomato"]), "moussaka")] * 10
PIZZA, ODD_PIZZA = (raw("pizza", ["pizza"]), "pizza"), (raw("pizza", ["pizza", "octopus"]), "pizza")


def test_an_item_of_unlike_classes_is_an_outlier():
    faulty = (raw("kazandibi", ["milk pudding", "eggplant"]), "kazandibi")
    statistics = count([*desserts(), *MOUSSAKA, faulty])
    (issue,) = lint(*faulty, statistics)
    assert (issue.rule, issue.item, issue.policy) == ("outlier", "eggplant", "flag")
    assert not any(lint(*row, statistics) for row in desserts())


def test_an_item_of_a_similar_class_is_no_outlier():
    likely = (raw("kazandibi", ["milk pudding", "mango"]), "kazandibi")
    rice_puddings = [(raw("sutlac", ["milk pudding", "mango"]), "sutlac")] * 10
    assert lint(*likely, count([*desserts(), *rice_puddings, likely])) == []


def test_a_new_item_is_no_outlier_where_many_rows_have_one():
    rare = (raw("kazandibi", ["milk pudding", "honey"]), "kazandibi")
    assert lint(*rare, count([*desserts(), rare])) == []


def test_a_row_that_shares_nothing_with_its_class_is_an_outlier():
    faulty = (raw("kazandibi", ["octopus", "licorice"]), "kazandibi")
    assert [issue.item for issue in lint(*faulty, count([*desserts(), faulty]))] == ["octopus", "licorice"]


def test_a_new_item_is_an_outlier_where_few_rows_have_one():
    assert rules(lint(*ODD_PIZZA, count([PIZZA] * 30 + [ODD_PIZZA]))) == {"outlier"}


def test_small_classes_are_smoothed_with_the_whole_data_set():
    varied = [row for number in range(20) for row in desserts(f"kazandibi {number}")]
    assert lint(*ODD_PIZZA, count([*varied, *[PIZZA] * 10, ODD_PIZZA])) == []
    assert rules(lint(*ODD_PIZZA, count([*varied, *[PIZZA] * 400, ODD_PIZZA]))) == {"outlier"}


def test_outliers_need_support_and_no_word_of_the_class_name():
    assert lint(*ODD_PIZZA, count([PIZZA] * 5 + [ODD_PIZZA])) == []
    assert lint(*ODD_PIZZA, count([(label, "") for label, _ in [PIZZA] * 30 + [ODD_PIZZA]])) == []
    named = (raw("octopus pizza", ["pizza", "octopus"]), "octopus pizza")
    assert lint(*named, count([(raw("octopus pizza", ["pizza"]), "octopus pizza")] * 30 + [named])) == []


def test_an_outlier_can_be_dropped():
    record, _ = clean(*ODD_PIZZA, count([PIZZA] * 30 + [ODD_PIZZA]), POLICIES | {"outlier": "fix"})
    assert record.food_items == ["pizza"]


def test_the_common_form_of_a_name_wins():
    rows = [(raw("egg", ["egg"]), "")] * 10 + [(raw("eggs", ["eggs"]), "")]
    record, issues = clean(*rows[-1], count(rows))
    assert (record.food_items, rules(issues)) == (["egg"], {"rare_form"})
    assert lint(*rows[0], count(rows)) == []
    assert lint(*rows[-1], count(rows[7:])) == []


def test_other_rows_decide_the_field_of_unknown_names():
    rows = [(raw("californication", [], ["californication"]), "")] * 6 + [
        (raw("californication", ["californication"]), "")
    ]
    record, issues = clean(*rows[-1], count(rows))
    assert (record.drink_items, rules(issues)) == (["californication"], {"wrong_field"})
    assert lint(*rows[-1], count(rows[4:])) == []


def test_is_food_against_the_class():
    rows = [(raw("pizza", ["pizza"]), "pizza")] * 20 + [(raw(is_food=0), "pizza")]
    assert rules(lint(*rows[-1], count(rows))) == {"class_contradiction"}
    assert lint(*rows[0], count(rows)) == []
    assert lint(*rows[-1], count(rows[15:])) == []


def test_lint_reports_the_faults_of_the_row_too_and_changes_no_count():
    statistics = count(desserts())
    before = {name: dict(table) for name, table in vars(statistics).items() if isinstance(table, dict)}
    assert rules(lint(raw("Moussaka", ["moussaka", "flour"], ["new tea"]), "unknown class", statistics)) == {
        "casing",
        "pantry",
    }
    lint(*ODD_PIZZA, statistics)
    assert before == {name: dict(table) for name, table in vars(statistics).items() if isinstance(table, dict)}


def test_statistics_grow_with_the_vocabulary_not_with_the_rows():
    few, many = count(desserts()), count(desserts() * 20)
    assert {key: set(items) for key, items in few.items.items()} == {
        key: set(items) for key, items in many.items.items()
    }
    assert many.rows["kazandibi"] == 20 * few.rows["kazandibi"]


# scene labels


@pytest.fixture(scope="module")
def scene_labels():
    found = [scenes.plan_scene(11, split, index)[0] for split in ("train", "test") for index in range(500)]
    return [
        (scenes.record_of(objects), " + ".join(sorted({placed.kind for placed in objects})) or "nothing")
        for objects in found
    ]


def test_drawn_scenes_have_no_issue(scene_labels):
    for record, category in scene_labels:
        assert clean(record, category) == (record, [])


def test_scene_labels_raise_few_false_alarms_as_a_data_set(scene_labels):
    statistics = count(scene_labels)
    alarms = [issues for label, category in scene_labels if (issues := lint(label, category, statistics))]
    assert len(alarms) <= 0.02 * len(scene_labels)


def test_every_drawing_is_in_its_field():
    assert [name for name in scenes.FOODS if vocabulary.field_of(name) == "drink_items"] == []
    assert [name for name in scenes.DRINKS if vocabulary.field_of(name) != "drink_items"] == []


# words


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(
            (name, "drink_items")
            for name in ("orange juice", "Iced Latte", "turkish_coffee", "glass of wine", "cups of tea", "juice box")
        ),
        *(
            (name, "drink_items")
            for name in (
                "hot chocolate",
                "gin and tonic",
                "coffee with milk",
                "root beer float",
                "Coca-Cola",
                "rosé wine",
            )
        ),
        *(
            (name, "drink_items")
            for name in ("piña colada", "beers", "smoothies", "wine glass", "masala chaas (spiced)", "dr pepper")
        ),
        *(
            (name, "food_items")
            for name in ("coffee cake", "beer bread", "tea egg", "milk chocolate", "shrimp cocktail", "water chestnuts")
        ),
        *(
            (name, "food_items")
            for name in (
                "mussels in white wine",
                "penne alla vodka",
                "smoothie bowl",
                "rum cake",
                "baking soda",
                "rosewater",
            )
        ),
        *(
            (name, "food_items")
            for name in (
                "french fries",
                "cherries",
                "fish and chips",
                "lemon wedge",
                "matcha ice cream",
                "tea sandwiches",
            )
        ),
        *(
            (name, None)
            for name in (
                "cookies and milk",
                "wine vinegar",
                "californication",
                "noodle cup",
                "The Swedish Tart",
                "",
                "...",
            )
        ),
    ],
)
def test_field_of(name, field):
    assert vocabulary.field_of(name) == field


def test_no_name_is_listed_as_a_drink_and_as_a_food():
    assert not vocabulary.entries("drinks") & vocabulary.entries("foods")
    assert len(vocabulary.entries("drinks")) >= 500
    assert len(vocabulary.entries("foods")) >= 1000
    assert len(vocabulary.entries("pantry", "always")) >= 100


@pytest.mark.parametrize(
    ("item", "beside", "hidden"),
    [
        *(
            (item, "stew", True)
            for item in ("flour", "all-purpose flour", "sea salt", "Baking Powder", "vanilla extract", "olive oil")
        ),
        *(
            (item, "stew", False)
            for item in ("bell pepper", "peppers", "chili oil", "powdered sugar", "flour tortilla", "vanilla ice cream")
        ),
        *(
            (item, "stew", False)
            for item in ("sugar snap peas", "tikka masala", "salted caramel", "soy sauce", "dr pepper", "oilfish")
        ),
        ("eggs", "chocolate cake", True),
        ("eggs", "bibimbap", False),
        ("fried egg", "chocolate cake", False),
        ("butter", "curry", True),
        ("butter", "toast", False),
    ],
)
def test_hidden_ingredients(item, beside, hidden):
    assert vocabulary.is_hidden(item, [beside]) == hidden


@pytest.mark.parametrize(
    "pair",
    [
        *(
            "egg eggs",
            "cherry cherries",
            "loaf loaves",
            "leaf leaves",
            "potato potatoes",
            "peach peaches",
            "radish radishes",
            "pie pies",
        ),
        *(
            "smoothie smoothies",
            "cookie cookies",
            "brioche brioches",
            "octopus octopuses",
            "tofu tofus",
            "crêpe crepes",
            "hot-dog hot_dogs",
        ),
    ],
)
def test_names_that_are_the_same(pair):
    one, other = pair.split()
    assert vocabulary.key(one) == vocabulary.key(other)


@pytest.mark.parametrize(
    "pair", ["pear peach", "grape grapefruit", "egg eggplant", "corn popcorn", "roll rolled", "pasta paste"]
)
def test_names_that_are_not_the_same(pair):
    one, other = pair.split()
    assert vocabulary.key(one) != vocabulary.key(other)


@pytest.mark.parametrize(
    ("title", "names", "expected"),
    [
        ("there are three donuts", ["donut"], True),
        ("pizza on a wooden table", ["pizza"], True),
        ("a person eats pizza in the park", ["pizza"], True),
        ("we had pizza", ["pizza"], True),
        ("pizza with cheese", ["pizza"], False),
        ("grilled salmon with asparagus and lemon", [], False),
        ("toad in the hole", [], False),
        ("meat on the bone, pie, rice ball and cocktail", ["meat on the bone", "pie", "rice ball", "cocktail"], False),
    ],
)
def test_sentences(title, names, expected):
    assert vocabulary.is_sentence(title, names) == expected


# properties

NAMES = [
    "egg",
    "eggs",
    "Egg",
    "flour",
    "salt",
    "beer",
    "coffee cake",
    "pie",
    "fried_egg",
    " tea.",
    "milk",
    "cake",
    "butter",
    "bread flour",
]
name = st.one_of(st.sampled_from(NAMES), st.text(max_size=60), st.text("aeés_ .,()-\u0301\u200b", max_size=12))
titles = st.one_of(
    name,
    st.lists(name, max_size=12).map(" ".join),
    name.map("This is a photo of {}.".format),
    name.map("photo of photo of ".__add__),
)
items = st.lists(name, max_size=6) | st.lists(name, max_size=6).map(
    lambda names: names * 5 + [f"dish {i}" for i in range(len(names) * 5)]
)
labels = st.builds(raw, titles, items, items, st.integers(0, 1))
KNOWN = count([(raw("pie", ["pie", "egg"]), "pie")] * 20 + [(raw("tea", [], ["tea"]), "tea")] * 20)


@settings(max_examples=150, deadline=None)
@given(labels, st.sampled_from(["", "pie", "tea"]), st.sampled_from(["fix", "flag"]))
def test_cleaning_gives_valid_records_and_is_idempotent(label, category, policy):
    policies = dict.fromkeys(POLICIES, policy)
    for statistics in (Statistics(), KNOWN):
        record, issues = clean(label, category, statistics, policies)
        assert FoodRecord.parse(record.to_json()) == record
        assert issues or record == FoodRecord(**label)
        assert clean(record, category, statistics, policies)[0] == record


@given(labels)
@settings(max_examples=50, deadline=None)
def test_nothing_changes_without_a_fix(label):
    record, issues = clean(label)
    if not any(issue.policy == "fix" for issue in issues):
        assert record.model_dump() == label


def test_half_a_character_is_removed_whatever_the_policy():
    label = {"is_food": 1, "image_title": "ramen \ud83c", "food_items": ["ramen \ud83c"], "drink_items": []}
    record, _ = clean(label, policies=POLICIES | {"punctuation": "flag"})
    assert (record.image_title, record.food_items) == ("ramen", ["ramen"])

"""Measure how many corrupted labels the label rules find, and how often they report clean ones.

    python benchmarks/dataset_quality.py  # writes results/dataset_quality.json

The labels of two datasets are right by construction: drawn scenes (no class names, titles that list every item) and
food classes, composed here as a larger model would label photographs of them. Copies of their rows get faults of ten
kinds, half of each in either dataset where both can have it. A fault counts as found when a rule made for its kind
names the corrupted item. Clean rows are checked with the same statistics, and any issue in them is a false alarm.
No image is drawn.
"""

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from corruptions import LABEL_CORRUPTIONS, LabelCorruption, Raw
from foodextract.data import scenes
from foodextract.data.label_rules.cleaning import clean
from foodextract.data.label_rules.issues import Statistics
from foodextract.evaluation.evaluate import rate
from foodextract.evaluation.results import make_row, write_results

COMMAND = "python benchmarks/dataset_quality.py"
OUT = Path(__file__).parents[1] / "results" / "dataset_quality.json"

# class: foods in every image; foods in some, from common to rare | drinks in every image; drinks in some
CLASSES = {
    "lasagna": "lasagna; basil leaf, tomato sauce, cheese, side salad | ; red wine",
    "kazandibi": "milk pudding; cinnamon, ice cream, pistachio | ; turkish tea",
    "turkish coffee": "; turkish delight, chocolate | turkish coffee; water",
    "baklava": "baklava; pistachio, clotted cream, ice cream | ; tea",
    "caesar salad": "lettuce, crouton; parmesan, chicken breast, anchovy, lemon wedge | ; water",
    "greek salad": "tomato, cucumber, feta; olive, red onion, bell pepper | ; white wine",
    "sushi": "sushi; wasabi, pickled ginger, soy sauce | ; green tea, sake",
    "ramen": "ramen; boiled egg, nori, spring onion, pork belly, bamboo shoot | ; beer",
    "pho": "noodle soup; beef, bean sprout, lime wedge, mint | ; iced tea",
    "pad thai": "noodles; shrimp, peanuts, lime wedge, bean sprout, egg | ;",
    "hamburger": "hamburger; french fries, ketchup, lettuce, pickle | ; cola, milkshake",
    "hot dog": "hot dog; mustard, ketchup, french fries, onion | ; cola",
    "pizza margherita": "pizza; basil leaf, tomato, mozzarella, olive | ; red wine, cola",
    "spaghetti carbonara": "spaghetti; bacon, parmesan, parsley | ; white wine",
    "fish and chips": "fried fish, french fries; peas, lemon wedge, tartar sauce | ; beer",
    "paella": "paella; shrimp, mussel, lemon wedge, bell pepper | ; sangria",
    "tacos": "taco; guacamole, salsa, cilantro, lime wedge | ; margarita",
    "burrito": "burrito; rice, beans, salsa, sour cream | ; horchata",
    "nachos": "tortilla chips; melted cheese, guacamole, jalapeno, sour cream | ; beer",
    "chicken curry": "chicken curry; rice, naan, cilantro | ; mango lassi",
    "biryani": "biryani; raita, boiled egg, lemon wedge, fried onion | ; buttermilk",
    "dosa": "dosa; sambar, coconut chutney, tomato chutney | ; filter coffee",
    "samosa": "samosa; mint chutney, tamarind chutney | ; masala chai",
    "butter chicken": "butter chicken; naan, rice, cilantro | ; lassi",
    "dim sum": "dumpling; bao, chili oil, spring roll | ; jasmine tea",
    "fried rice": "fried rice; egg, peas, shrimp, spring onion | ;",
    "bibimbap": "bibimbap; fried egg, kimchi, spinach, carrot | ; barley tea",
    "steak": "steak; mashed potato, asparagus, grilled tomato, french fries | ; red wine",
    "roast chicken": "roast chicken; roast potato, carrot, gravy, green beans | ; white wine",
    "fried chicken": "fried chicken; coleslaw, french fries, biscuit | ; sweet tea",
    "omelette": "omelette; toast, tomato, cheese, mushroom | ; coffee, orange juice",
    "full breakfast": "fried egg, bacon; sausage, baked beans, toast, grilled tomato, mushroom | ; tea, coffee",
    "pancakes": "pancakes; maple syrup, blueberries, strawberry, banana | ; coffee, milk",
    "waffles": "waffle; whipped cream, strawberry, chocolate sauce | ; coffee",
    "french toast": "french toast; berries, maple syrup, powdered sugar | ; coffee",
    "croissant": "croissant; jam, fruit salad | ; cappuccino, orange juice",
    "cheesecake": "cheesecake; strawberry, raspberry sauce, mint leaf | ; espresso",
    "chocolate cake": "chocolate cake; raspberry, whipped cream, ice cream | ; milk",
    "apple pie": "apple pie; vanilla ice cream, whipped cream | ; coffee",
    "tiramisu": "tiramisu; strawberry, mint leaf | ; espresso",
    "ice cream": "ice cream; wafer, sprinkles, cherries, chocolate sauce | ;",
    "doughnuts": "doughnut; sprinkles | ; coffee",
    "cupcakes": "cupcake; sprinkles, strawberry | ;",
    "fruit platter": "watermelon, pineapple; grapes, kiwi, mango, strawberry, orange | ;",
    "cheese board": "cheese, cracker; grapes, walnut, fig, salami, olive | ; red wine",
    "hummus": "hummus; pita, olive oil drizzle, chickpea, parsley | ; mint tea",
    "falafel": "falafel; pita, tahini, tomato, pickle | ; ayran",
    "shawarma": "shawarma; french fries, pickle, garlic sauce | ; cola",
    "goulash": "goulash; bread, dumpling, sour cream | ; beer",
    "pierogi": "pierogi; fried onion, sour cream, bacon | ; kompot",
    "latte": "; croissant, cookie | latte; water",
    "smoothie": "; banana, strawberry, mint leaf | smoothie;",
    "mojito": "; lime wedge, nachos | mojito;",
    "beer": "; pretzel, peanuts, french fries | beer;",
    "afternoon tea": "scone, sandwich; jam, clotted cream, macaron | tea; champagne",
}


@dataclass(frozen=True)
class Row:
    """One label as a source yields it. `fault` is the kind of its corruption, `item` the name that it concerns."""

    raw: Raw
    category: str
    origin: str
    fault: str = ""
    item: str = ""


def scene_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """Return the labels of drawn scenes in random order, with their kinds of objects as class."""
    rows = []
    for index in rng.choice(100_000, count, replace=False):
        objects, _ = scenes.plan_scene(7, "train", int(index))
        category = " + ".join(sorted({placed.kind for placed in objects})) or "nothing"
        rows.append(Row(scenes.record_of(objects).model_dump(), category, "scenes"))
    return rows


def parts(category: str) -> list[list[str]]:
    """Return the foods always and sometimes, and the drinks always and sometimes seen with a class."""
    return [[*filter(None, part.strip().split(", "))] for part in CLASSES[category].replace("|", ";").split(";")]


def class_rows(rng: np.random.Generator, per_class: int) -> list[Row]:
    """Return labels of food classes: what a class always shows, some of the rest, a title in one of three styles."""
    rows = []
    for name in CLASSES:
        foods, some_foods, drinks, some_drinks = parts(name)
        for _ in range(per_class):
            eaten = foods + [item for rank, item in enumerate(some_foods, 1) if rng.random() < 0.5 / rank]
            drunk = drinks + [item for rank, item in enumerate(some_drinks, 1) if rng.random() < 0.2 / rank]
            items = eaten + drunk
            title = (name, f"{name} with {items[-1]}" if items[1:] else name, " and ".join(items[:2]))[rng.integers(3)]
            raw = {"is_food": 1, "image_title": title, "food_items": eaten, "drink_items": drunk}
            rows.append(Row(raw, name, "food classes"))
    return rows


# Two more kinds of faults, which need the items of a class.


def _outlier(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    """Add a dish of a class that has nothing in common with this one."""
    own = {item for part in parts(category) for item in part}
    unrelated = [other for other in CLASSES if not any(own & set(part) for part in parts(other))]
    foreign = [item for other in unrelated for item in parts(other)[0]]
    name = str(rng.choice([item for item in foreign if not set(item.split()) & set(category.split())]))
    raw["food_items"].append(name)
    return name


def _title_mismatch(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    texts = (category, raw["image_title"], *raw["food_items"], *raw["drink_items"])
    words = " ".join({word for text in texts for word in text.split()})
    titles = [title for title in CLASSES if not any(word[:4] in words for word in title.split())]
    raw["image_title"] = str(rng.choice(titles))
    return ""


KINDS: dict[str, tuple[LabelCorruption, set[str]]] = LABEL_CORRUPTIONS | {
    "outlier": (_outlier, {"outlier"}),
    "title mismatch": (_title_mismatch, {"title_mismatch"}),
}


def corrupt(rng: np.random.Generator, rows: list[Row], per_kind: int) -> list[Row]:
    """Return the same rows, of which `per_kind` of each kind have one fault each."""
    rows, free = list(rows), [int(index) for index in rng.permutation(len(rows)) if rows[index].raw["is_food"]]
    for kind, (change, _) in KINDS.items():
        origins = ["food classes"] if kind == "outlier" else ["food classes", "scenes"]
        for number in range(per_kind):
            item = None
            while item is None:
                index = next(i for i in free if rows[i].origin == origins[number % len(origins)])
                free.remove(index)
                raw = copy.deepcopy(rows[index].raw)
                item = change(rng, raw, rows[index].category)
            rows[index] = Row(raw, rows[index].category, rows[index].origin, kind, item)
    return rows


def measure(rows: list[Row]) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return (kind, found) of every fault and (origin, alarm) of every clean row."""
    statistics = Statistics()
    for row in rows:
        record, _ = clean(row.raw, row.category)
        if record is not None:
            statistics.add(record, row.category)
    faults, alarms = [], []
    for row in rows:
        _, issues = clean(row.raw, row.category, statistics)
        if row.fault:
            rules = KINDS[row.fault][1]
            found = any(issue.rule in rules and repr(row.item)[1:-1] in issue.reason for issue in issues)
            faults.append((row.fault, found))
            if not found:
                print(f"missed {row.fault}: {row.item!r} in {row.category!r}: {json.dumps(row.raw)}")
        else:
            alarms.append((row.origin, bool(issues)))
            for issue in issues:
                print(f"false alarm: {issue.rule}, {issue.reason}: {row.category!r}: {json.dumps(row.raw)}")
    return faults, alarms


def main(
    seed: Annotated[int, typer.Option(help="Which rows get which faults.")] = 0,
    per_kind: Annotated[int, typer.Option(min=1, help="Faults of each of the ten kinds.")] = 20,
    count: Annotated[int, typer.Option(min=100, help="Drawn scenes; the food classes are about as many.")] = 1100,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = OUT,
) -> None:
    """Corrupt labels, look for the faults, write the figures."""
    rng = np.random.default_rng(seed)
    rows = corrupt(rng, scene_rows(rng, count) + class_rows(rng, round(count / len(CLASSES))), per_kind)
    faults, alarms = measure(rows)
    row = partial(make_row, "dataset_quality", command=COMMAND)
    figures = []
    for metric, outcomes in (("faults_found_share", faults), ("false_alarm_share", alarms)):
        for subject in ("all", *dict.fromkeys(subject for subject, _ in outcomes)):
            share = rate(metric, [hit for name, hit in outcomes if subject in ("all", name)])
            figures.append(row(subject, metric, share.value, low=share.low, high=share.high, n=share.n))
            print(f"{metric:20} {subject:16} {share.value:7.2%}  [{share.low:.2%}, {share.high:.2%}]  n = {share.n}")
    write_results(out, figures)


if __name__ == "__main__":
    typer.run(main)

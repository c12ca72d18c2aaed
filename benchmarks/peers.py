"""Who answers the drawn test scenes how well: a majority, the nearest training picture, the base and the tuned model, free and constrained.

    python benchmarks/peers.py                                   # the scenes of `make demo`; writes results/peers.json
    python benchmarks/peers.py --tuned outputs/offline/stage2    # the model that `make demo` has just made

All of them answer the same pictures and are scored by the same evaluation, only strict answers counting; the tuned model is compared with
each of the others, picture by picture. Breakdowns by number of items follow each subject behind a bar.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from tqdm import tqdm

from foodextract import evaluation, models
from foodextract.comparison import compare, difference_rows
from foodextract.extractor import Extractor
from foodextract.peers import Majority, Nearest
from foodextract.results import Row, write_results
from foodextract.scenes import draw_scenes, plan_scene, record_of
from foodextract.schema import FoodRecord

COMMAND = "python benchmarks/peers.py"
OUT = Path(__file__).parents[1] / "results" / "peers.json"
BROKEN_DOWN = ("strict_json_rate", "is_food_accuracy", "item_f1_micro")


def measure(
    answerers: dict[str, evaluation.BatchAnswer], ours: str, pictures: list[Image.Image], labels: list[FoodRecord], batch: int, command: str
) -> list[Row]:
    """All figures of everybody on the same pictures, those BROKEN_DOWN by number of items, and ours minus each of the others."""
    answers = {subject: evaluation.ask(answer, pictures, batch, subject) for subject, answer in answerers.items()}
    groups = [evaluation.number_of_items(label) for label in labels]
    rows: list[Row] = []
    for subject, texts in answers.items():
        rows += evaluation.to_rows("peers", subject, evaluation.score(labels, texts), command)
        for group, metrics in evaluation.breakdown(labels, texts, groups).items():
            few = [metric for metric in metrics if metric.name in BROKEN_DOWN]
            rows += evaluation.to_rows("peers", f"{subject} | {group}", few, command)
    for subject, texts in answers.items():
        if subject != ours:
            rows += difference_rows("peers", f"{ours} minus {subject}", compare(labels, answers[ours], texts), command)
    return rows


def main(
    seed: Annotated[int, typer.Option(help="Which scenes; the default's are those of `make demo`.")] = 42,
    train: Annotated[int, typer.Option(min=1, help="Training scenes, which the peers look up.")] = 2400,
    test: Annotated[int, typer.Option(min=2, help="Test scenes.")] = 600,
    base: Annotated[str, typer.Option(help="The base model, whose vision tower the nearest neighbour sees with.")] = str(models.TINY_BASE),
    tuned: Annotated[str, typer.Option(help="The tuned model.")] = str(models.TINY_TUNED),
    neighbours: Annotated[int, typer.Option(min=1, help="How many neighbours vote.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a model sees at once.")] = 50,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = OUT,
) -> None:
    """Score the peers and write the figures."""
    command = " ".join([COMMAND, *sys.argv[1:]])
    records = [record_of(plan_scene(seed, "train", index)[0]) for index in range(train)]
    seen = (scene.image for scene in tqdm(draw_scenes(seed, "train", train), total=train, desc="looking at training scenes", unit="scene"))
    held_out = list(tqdm(draw_scenes(seed, "test", test), total=test, desc="drawing test scenes", unit="scene"))
    extractor, ours = Extractor.from_pretrained(base), Extractor.from_pretrained(tuned)
    answerers = {
        "majority": evaluation.each(Majority.fit(records)),
        "nearest": evaluation.each(Nearest.fit(extractor, seen, records, neighbours)),
        "base": extractor.answer,
        "base constrained": partial(extractor.answer, constrained=True),
        "tuned": ours.answer,
        "tuned constrained": partial(ours.answer, constrained=True),
    }
    rows = measure(answerers, "tuned", [scene.image for scene in held_out], [scene.record for scene in held_out], batch, command)
    write_results(out, rows)
    for row in rows:
        if row.metric in BROKEN_DOWN and "|" not in row.subject:
            print(f"{row.subject:>17} {row.metric:20} {row.value:.3f} ({row.low:.3f} to {row.high:.3f}), n = {row.n}")


if __name__ == "__main__":
    typer.run(main)

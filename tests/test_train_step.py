"""The benchmark of training: it runs, resumes, and measures every step of the ladder."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

import train_report
import train_step
from foodextract.evaluation.results import read_results
from foodextract.models import precision
from train_recipes import STAGES, ladder


def run(results):
    train_step.main(size=["tiny"], device="cpu", repeats=1, steps=1, batch=2, results=results)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_every_rung_is_told(tmp_path, monkeypatch, capsys):
    results, measure, measured = tmp_path / "train_cpu.json", train_step.measure, []

    def few(cell, *rest):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell.recipe)
        return measure(cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "measure", few)
        with pytest.raises(KeyboardInterrupt):
            run(results)
    assert not results.exists()
    monkeypatch.setattr(train_step, "measure", lambda cell, *rest: measured.append(cell.recipe) or measure(cell, *rest))
    run(results)
    cpu = train_step.loading.choose_device("cpu")
    ladders = [
        [recipe.name for stage in STAGES.values() for recipe in ladder(stage, cpu, slow_bf16=slow)]
        for slow in (False, True)
    ]
    assert measured in ladders  # each once, the first three not again
    assert not list(tmp_path.glob("*.jsonl"))
    rows = {(row.subject, row.metric): row for row in read_results(results)}
    for stage in STAGES:
        seed, ours = (rows[f"tiny, {stage}, {name}", "tflop_per_image"].value for name in ("seed_recipe", "ours"))
        assert seed > 5 * ours > 0
        assert rows[f"tiny, {stage}, ours", "speedup_vs_seed"].value > 1
        assert rows[f"tiny, {stage}, ours", "once_seconds_per_image"].value > 0
        assert rows[f"tiny, {stage}, seed_recipe", "mfu"].value > 0
    assert results.with_suffix(".png").stat().st_size > 10_000
    table = train_report.tables(list(rows.values()))
    assert table.count(": ours |") == len(STAGES)
    assert "A whole training of TINY" in table


def test_every_rung_changes_one_thing():
    for device in ("cpu", "meta"):
        for stage in STAGES.values():
            rungs = ladder(stage, train_step.torch.device(device))
            for below, above in pairwise(rungs):
                changed = [name for name in vars(above) if getattr(above, name) != getattr(below, name)]
                assert len(changed) == 2, (above.name, changed)  # its name, and what it changes
            ours = next(rung for rung in rungs if rung.name == "ours")
            assert (ours.tiles, ours.cached, ours.prepared, ours.bf16) == (1, bool(stage.freeze), True, False)


def test_where_bf16_is_slow_the_seed_is_not_measured_in_it():
    for stage in STAGES.values():
        rungs = ladder(stage, train_step.torch.device("cpu"), 500_000_000, slow_bf16=True)
        assert {(rung.master, rung.bf16) for rung in rungs} == {(True, False)}
        assert (rungs[0].tiles, rungs[0].checkpointing, rungs[-1].name) == (17, True, "ours")


def test_what_bf16_would_add_is_asked_where_a_cpu_trains_in_fp32(monkeypatch):
    cpu = train_step.torch.device("cpu")
    for bf16, last in ((1, "ours"), (2, "ours with bf16 autocast")):
        monkeypatch.setattr(precision, "measured", lambda bf16=bf16: {"many": {"fp32": 2, "bf16": bf16}})
        assert ladder(STAGES["stage1"], cpu, 500_000_000)[-1].name == last


def test_figures_without_repetition_have_no_interval():
    cell = train_report.Cell(
        "tiny", "stage1", "seed_recipe", 0, "", "cpu", 1, step=[9.0], data=[1.0, 1.0], flops=18.0, rate=4.0
    )
    cells = [replace(cell, stage=stage, recipe=name) for stage in STAGES for name in ("seed_recipe", "ours")]
    cells = [replace(c, step=[0.5, 1.0, 1.5], once=2.0) if c.recipe == "ours" else c for c in cells]
    rows = {(row.subject, row.metric): row for row in train_report.summarize(cells, "train_cpu", "")}
    speedup = rows["tiny, stage1, ours", "speedup_vs_seed"]
    assert (speedup.value, speedup.low) == (5.0, None)
    assert (
        rows["tiny, stage1, ours", "seconds_per_image"].low < 2 < rows["tiny, stage1, ours", "seconds_per_image"].high
    )
    assert rows["tiny, stage1, seed_recipe", "mfu"].value == 0.5
    assert (
        rows["tiny, whole training, ours", "seconds_per_image"].value == 2 + 2 * 2 * 2
    )  # once, and two epochs of both stages
    assert rows["tiny, whole training, ours", "speedup_vs_seed"].value == 4


def test_the_cells_of_another_commit_are_measured_again():
    cell = train_report.Cell("tiny", "stage1", "ours", 0, "abc", "cpu", 4)
    assert train_report.Cell(**json.loads(json.dumps(vars(cell)))).key == cell.key != replace(cell, commit="def").key

"""The benchmarks of extraction run and measure what they claim to."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import extract
import extract_onnx
import extract_report
import memory
import photo_precision
import valid
from foodextract.evaluation.results import read_results, write_results
from foodextract.models.loading import TINY_BASE, TINY_TUNED


def figures(path):
    return {(row.subject, row.metric): row for row in read_results(path)}


@pytest.mark.slow
def test_every_optimization_is_measured(tmp_path):
    results = tmp_path / "extract.json"
    extract.main(["tiny"], images=1, batch=[1, 2], threads=1, processor=TINY_TUNED, results=results)
    of = figures(results)
    [seed] = {subject for subject, _ in of if extract_report.SEED in subject}
    [default] = {subject.removeprefix("tiny, ") for subject, _ in of if subject.endswith(extract_report.DEFAULT)}
    assert "fp32" in default  # at this size
    ways = ("ours int8", "ours bf16, decoding int8", "one tile", "one tile, our loop")
    for name in (seed.removeprefix("tiny, "), default, *ways):
        whole = of[f"tiny, {name}", "cpu_seconds_per_image"].value
        phases = [of[f"tiny, {name}", f"{phase}_cpu_seconds"].value for phase in extract_report.PHASES]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) == pytest.approx(whole, rel=0.2)
    assert of[seed, "prompt_tokens"].value > 2 * of["tiny, one tile", "prompt_tokens"].value
    assert of["tiny, forced tokens alone", "decode_speedup"].value > 1
    assert results.with_suffix(".png").stat().st_size > 10_000
    rows = list(of.values())
    assert extract_report.costs(rows, "speedup_vs_seed", "original ÷ this").count("\n") == 7 + ("bf16" in seed)
    elsewhere = [dataclasses.replace(row, device="Another CPU") for row in rows]
    write_results(results, elsewhere)
    extract.main(["tiny"], images=1, batch=[1, 2], threads=1, processor=TINY_TUNED, results=results)
    first, second = extract_report.by_device(read_results(results))
    assert second == elsewhere
    assert [row.subject for row in first] == [row.subject for row in rows]
    assert "times the tokens per CPU-second" in extract_report.batches(rows)


@pytest.mark.slow
def test_parity_and_latency_of_onnx_are_measured(tmp_path):
    results = tmp_path / "onnx.json"
    extract_onnx.main(["tiny"], compared=4, images=1, batch_size=3, threads=1, model=TINY_TUNED, results=results)
    of = figures(results)
    assert of["ONNX fp32 or torch fp32", "same_answer_rate"].value == 1
    for way in ("torch fp32", "ONNX fp32", "ONNX int8"):
        assert of[f"tiny, {way}", "vision_cpu_seconds"].value > 0


@pytest.mark.slow
def test_validity_and_memory_are_measured(tmp_path, capsys):
    valid.main(8, 8, 4, TINY_TUNED, TINY_BASE, tmp_path / "valid.json")
    of = figures(tmp_path / "valid.json")
    assert [of[name, "schema_valid_rate"].value for name in ("tuned", "base", "random weights")] == [1, 1, 1]
    assert {of[f"{precision} or fp32", "same_answer_rate"].n for precision in ("bf16", "int8")} == {8}
    memory.main(100, 8, tmp_path / "memory.json")
    assert (tmp_path / "memory.png").stat().st_size > 5_000
    assert "100 images of many sizes" in extract_report.memory(read_results(tmp_path / "memory.json"))


@pytest.mark.slow
def test_precisions_of_the_photo_model_are_compared(tmp_path):
    """On noise in the place of photographs, with the tiny model."""
    rng, lines = np.random.default_rng(0), []
    for number in range(120):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((99, 90)).save(tmp_path / f"{number}.png")
        row = {"file": f"{number}.png", "source": "noise", "licence": "MIT", "licence_class": "permissive"}
        row |= {"is_food": 0, "food_items": [], "drink_items": [], "label_scope": "primary", "group": f"{number}"}
        lines.append(json.dumps(row))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    photo_precision.main(tmp_path, count=3, model=TINY_TUNED, out=tmp_path / "photo_precision.json")
    of = figures(tmp_path / "photo_precision.json")
    assert of["ours fp32 (default) and fp32", "same_answer_rate"].value == 1
    assert of["ours int8 and fp32", "same_is_food_rate"].n == 3
    assert of["ours fp32 (default): alone and in 32", "same_answer_rate"].value == 1
    [_, table, _] = extract_report._photo_precision_parts(list(of.values()))
    assert table.count("\n") == 5

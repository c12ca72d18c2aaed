"""The benchmark for the hour when there is a GPU, at tiny size on a CPU."""

import pytest

import gpu
from foodextract.evaluation.results import make_row, read_results
from foodextract.models.loading import TINY_TUNED


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_and_extraction_are_measured(tmp_path, capsys):
    options = {"batch": [1, 2], "train_batch": 2, "processor": TINY_TUNED, "out": tmp_path}
    gpu.main(size="tiny", device="cpu", images=1, steps=1, **options)
    files = {path.name.partition("_gpu_")[0]: path for path in tmp_path.glob("*_gpu_*.json")}
    extraction, training = (
        {(row.subject, row.metric): row.value for row in read_results(files[name])} for name in ("extract", "train")
    )
    for way in (gpu.SEED, gpu.STATIC, gpu.OURS):
        assert extraction[f"tiny, {way}", "seconds_per_image"] > 0
    assert extraction[f"tiny, {gpu.OURS}", "speedup_vs_seed"] > 1
    assert extraction[f"tiny, batch 2, {gpu.OURS}", "images_per_second"] > 0
    for stage in ("stage1", "stage2"):
        rate, spent = (
            training[f"tiny, {stage}, ours", f"{name}"] for name in ("images_per_second", "seconds_per_image")
        )
        assert rate * spent == pytest.approx(1, rel=1e-3)
    assert {subject.split(", ")[-1] for subject, _ in training} == {"seed_recipe", "ours"}
    assert "stage1, ours: images_per_second is" in capsys.readouterr().out


def test_what_falls_short_is_said():
    values = {"stage1, ours": 400, "stage2, ours": 100}
    rows = [
        make_row("train_gpu_x", f"500m, {end}", "images_per_second", rate, n=1, command="")
        for end, rate in values.items()
    ]
    rows += [make_row("train_gpu_x", f"500m, {end}", "mfu", 0.31, n=1, command="") for end in values]
    rows += [make_row("train_gpu_x", "500m, stage1, ours", "speedup_vs_seed", 400, n=1, command="")]
    rows += [
        make_row("extract_gpu", f"500m{batch}, ours", "speedup_vs_seed", gain, n=1, command="")
        for batch, gain in (("", 9), (", batch 8", 40))
    ]
    assert gpu.short_of_target(rows) == [
        "500m, stage2, ours: images_per_second is 100, 50% of 200",
        "500m, batch 8, ours: speedup_vs_seed is 40, 80% of 50",
    ]

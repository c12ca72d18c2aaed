import pytest

import corruptions
from foodextract.data import dataset, sources


@pytest.mark.slow
def test_corruptions_are_found(tmp_path):
    log = []
    samples = list(corruptions.corrupted(sources.scenes(seed=3, train=120, test=40), every=5, log=log))
    assert len(samples) == 160 + 32
    report = dataset.build(samples, tmp_path / "out")
    assert report["read"] == 192
    found = corruptions.count_found(log, tmp_path / "out")
    kinds = {*corruptions.LABEL_CORRUPTIONS, *(f"{change.__name__} copy" for change in corruptions.IMAGE_CORRUPTIONS)}
    assert {kind for kind, *_ in found} == kinds
    assert sum(number for kind, number, _ in found if kind in corruptions.LABEL_CORRUPTIONS) >= 16
    assert [(kind, number) for kind, number, _ in found] == [(kind, hits) for kind, _, hits in found]


def test_the_same_seed_corrupts_the_same():
    one, two = (
        list(corruptions.corrupted(sources.scenes(seed=3, train=10, test=4), every=3, seed=1)) for _ in range(2)
    )
    assert [(a.name, a.label, a.read()) for a in one] == [(b.name, b.label, b.read()) for b in two]

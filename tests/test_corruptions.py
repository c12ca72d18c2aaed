import json

import corruptions
from foodextract.data import dataset, sources


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_corruptions_are_found(tmp_path):
    clean = list(sources.scenes(seed=3, train=120, test=40))
    samples = list(corruptions.corrupted(iter(clean), every=5))
    originals = {sample.name: sample for sample in clean}
    faulty = {
        sample.name for sample in samples if sample.name in originals and sample.label != originals[sample.name].label
    }
    copies = {sample.name for sample in samples} - set(originals)
    assert len(copies) == 32
    assert len(faulty) >= 16
    report = dataset.build(samples, tmp_path / "out")
    assert report["read"] == 192
    assert faulty <= {issue["name"] for issue in lines(tmp_path / "out/issues.jsonl")}
    alike = [set(group["names"]) for group in lines(tmp_path / "out/near_duplicates.jsonl")]
    rejected = {reject["name"] for reject in lines(tmp_path / "out/rejects.jsonl")}
    for name in copies - rejected:
        assert any({name, name.removesuffix("-copy.png")} <= group for group in alike), name


def test_the_same_seed_corrupts_the_same():
    first, second = (
        list(corruptions.corrupted(sources.scenes(seed=3, train=10, test=4), every=3, seed=1)) for _ in range(2)
    )
    assert [(a.name, a.label, a.read()) for a in first] == [(b.name, b.label, b.read()) for b in second]

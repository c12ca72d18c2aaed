"""The page shows the measured figures of server and Space, and the figures meet their targets."""

import os
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import serve_report
from foodextract.evaluation.results import read_results
from hostile import hostile
from served import Served, growth

ROOT = Path(__file__).parents[1]


def rows_of(name):
    path = ROOT / "results" / name
    if not path.exists():
        pytest.skip(f"{name} is not measured yet: see benchmarks/README.md")
    return read_results(path)


@pytest.fixture(scope="module")
def measured():
    return {(row.subject, row.metric): row for row in rows_of("serving.json")}


def test_the_page_shows_what_is_in_results():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for name, text in serve_report.SECTIONS.items():
        assert f"<!-- {name} -->\n{text(ROOT)}\n<!-- /{name} -->" in page, (
            f"run `python benchmarks/serve_report.py`: {name} is out of date"
        )


def test_twice_the_load_loses_nothing_and_memory_stays_flat(measured):
    for (_, metric), row in measured.items():
        if metric == "lost_or_unexpected":
            assert row.value == 0
    assert measured["ours, 2 x load", "lost_or_unexpected"].n > 500
    assert measured["ours, 2 x load", "memory_growth_share"].value < 0.05


def test_faster_than_one_at_a_time(measured):
    assert measured["ours", "speedup_vs_flask"].low >= 2.5


def test_faults_lose_nothing(measured):
    for name in ("lost", "unexpected", "ended_badly"):
        assert measured["SIGTERM", name].value == 0
    assert measured["SIGTERM", "answered"].value > 100
    assert measured["SIGKILL", "answers_changed"].value == 0
    assert measured["hostile uploads", "refused_share"].n >= 1000
    assert measured["hostile uploads", "crashes"].value == measured["honest among them", "spoilt"].value == 0
    assert measured["hostile uploads", "memory_growth_share"].value < 0.05
    assert measured["schemathesis", "findings"].value == 0
    assert measured["schemathesis", "findings"].n > 100


def test_every_hostile_upload_is_refused(measured):
    assert measured["hostile uploads", "refused_share"].value == 1


def test_starts_are_stated_for_all_sizes(measured):
    for size in ("tiny", "256m", "500m"):
        assert {metric for subject, metric in measured if subject == size} == {"seconds", "peak_memory_gib"}


def test_the_page_of_the_space_loads_fast():
    assert {row.subject: row for row in rows_of("space.json")}["page"].value <= 3


def test_ten_people_at_once_are_answered():
    rows = {row.subject: row for row in rows_of("space.json")}
    assert rows["ten at once"].value == rows["ten at once"].n == 10


def test_peak_memory_counts_freed_memory():
    held = Served(SimpleNamespace(pid=os.getpid()), "", 0.0)
    np.ones(2**26)  # half a GiB, given back at once
    assert held.peak() > held.resident() + 0.2


def test_growth_is_between_the_second_tenth_and_the_last():
    assert growth([9, 1, *[5] * 7, 2]) == pytest.approx(1)
    assert growth([3.0]) == 0


def test_hostile_requests_are_the_same_every_time_and_of_every_kind():
    series = list(islice(hostile(64), 64))
    assert series == list(hostile(64))
    assert len({kind for kind, _ in series}) == 16

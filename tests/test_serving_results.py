"""The measured figures of the server and the Space meet their targets."""

import os
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from foodextract.evaluation.results import read_results
from hostile import hostile
from served import Served, growth

ROOT = Path(__file__).parents[1]


def rows_of(name):
    return read_results(ROOT / "results" / name)


@pytest.fixture(scope="module")
def measured():
    return {(row.subject, row.metric): row for row in rows_of("serving.json")}


@pytest.mark.docs
def test_twice_the_load_loses_nothing_and_memory_stays_flat(measured):
    for (_, metric), row in measured.items():
        if metric == "lost_or_unexpected":
            assert row.value == 0
    assert measured["ours, 2 x load", "lost_or_unexpected"].n > 500
    assert measured["ours, 2 x load", "memory_growth_share"].value < 0.05


@pytest.mark.docs
def test_faster_than_one_at_a_time(measured):
    assert measured["ours", "speedup_vs_flask"].low >= 2.5


@pytest.mark.docs
def test_faults_lose_no_request(measured):
    for name in ("lost", "unexpected", "ended_badly"):
        assert measured["SIGTERM", name].value == 0
    assert measured["SIGTERM", "answered"].value > 100
    assert measured["SIGKILL", "answers_changed"].value == 0
    assert measured["hostile uploads", "refused_share"].n >= 1000
    assert measured["hostile uploads", "crashes"].value == measured["honest among them", "spoilt"].value == 0
    assert measured["hostile uploads", "memory_growth_share"].value < 0.05
    assert measured["schemathesis", "findings"].value == 0
    assert measured["schemathesis", "findings"].n > 100


@pytest.mark.docs
def test_every_hostile_upload_is_refused(measured):
    assert measured["hostile uploads", "refused_share"].value == 1


@pytest.mark.docs
def test_start_up_is_measured_for_all_sizes(measured):
    for size in ("tiny", "256m", "500m"):
        assert {metric for subject, metric in measured if subject == size} == {"seconds", "peak_memory_gib"}


@pytest.mark.docs
def test_the_page_of_the_space_loads_within_three_seconds():
    assert {row.subject: row for row in rows_of("space.json")}["page"].value <= 3


@pytest.mark.docs
def test_ten_simultaneous_users_are_answered():
    rows = {row.subject: row for row in rows_of("space.json")}
    assert rows["ten at once"].value == rows["ten at once"].n == 10


@pytest.mark.docs
def test_peak_memory_outlives_the_allocation():
    held = Served(SimpleNamespace(pid=os.getpid()), "", 0.0)
    np.ones(2**26)  # half a GiB, freed at once
    assert held.peak() > held.resident() + 0.2


@pytest.mark.docs
def test_growth_compares_the_second_tenth_with_the_last():
    assert growth([9, 1, *[5] * 7, 2]) == pytest.approx(1)
    assert growth([3.0]) == 0


@pytest.mark.docs
def test_hostile_requests_are_reproducible_and_of_every_kind():
    series = list(islice(hostile(64), 64))
    assert series == list(hostile(64))
    assert len({kind for kind, _ in series}) == 16

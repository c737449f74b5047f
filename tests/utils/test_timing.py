"""Samples, contention and the allocator's peak."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from linformer_hf.utils import timing as measuring
from linformer_hf.utils.timing import Samples, interleave, peak_bytes, timed


@pytest.fixture
def spend(monkeypatch):
    """`spend(seconds, cpu)` lets so much time pass, of a clock that nothing else moves."""
    clock = {"wall": 0.0, "cpu": 0.0, "busy": 0.0}

    def passed(seconds: float, cpu: float = 0.0, busy: float = 0.0) -> None:
        for name, more in (("wall", seconds), ("cpu", cpu), ("busy", busy)):
            clock[name] += more

    own = SimpleNamespace(perf_counter=lambda: clock["wall"], process_time=lambda: clock["cpu"])
    monkeypatch.setattr(measuring, "time", own)
    monkeypatch.setattr(measuring, "busy_seconds", lambda: clock["busy"])
    return passed


def test_every_case_gets_its_samples_in_rounds(spend):
    calls = []
    cases = {name: lambda name=name: calls.append(name) or spend(0.12) for name in "abc"}
    found = interleave(cases, samples=4, warm_up=1)
    assert {name: len(samples.wall) for name, samples in found.items()} == dict.fromkeys("abc", 4)
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1  # the order is drawn


def test_short_code_is_called_often_and_time_is_that_of_a_call(spend):
    count = []
    found = interleave({"short": lambda: count.append(1) or spend(0.002, 0.001)}, samples=3)["short"].summary()
    assert len(count) == 2 + 3 * 50  # a tenth of a second, after the warm-up
    assert (found["wall_s"], found["cpu_s"]) == pytest.approx((0.002, 0.001))


def test_the_median_leaves_contended_samples_out_where_three_others_remain():
    samples = Samples(wall=[1, 2, 3, 100, 100], cpu=[1, 2, 3, 100, 100], contended=[False, False, False, True, True])
    assert samples.summary()["wall_s"] == 2
    assert samples.summary()["contended"] == 2
    samples.contended = [False, False, True, True, True]
    assert samples.summary()["wall_s"] == 3
    assert samples.summary()["wall_range_s"] == [1, 100]


@pytest.mark.parametrize(("busy", "contended"), [(0.0, False), (0.5, True)])
def test_other_processes_are_noticed(spend, busy, contended):
    assert timed(lambda: spend(0.1, cpu=0.09, busy=0.09 + busy), 1)[2] is contended


def test_without_proc_stat_nothing_is_called_contended(monkeypatch):
    monkeypatch.setattr(measuring, "busy_seconds", lambda: None)
    assert timed(lambda: None, 1)[2] is False


def test_our_own_threads_are_not_other_processes():
    def spin():
        while time.thread_time() < 0.05:
            torch.ones(200, 200) @ torch.ones(200, 200)

    def call():
        thread = threading.Thread(target=spin)
        thread.start()
        thread.join()

    assert timed(call, 1)[1] > 0.04  # counted as ours, so it is subtracted from what the machine did


def test_peak_is_the_most_that_was_held_at_one_moment():
    kept = torch.ones(1000, 1000)  # before: does not count

    def call():
        one = kept + 1  # 4 MB
        two = one * 2  # 8 MB
        del one
        return two.sum()

    assert 8e6 <= peak_bytes(call) < 8.1e6

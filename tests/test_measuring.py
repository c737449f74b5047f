"""Samples, contention and the allocator's peak."""

import threading
import time

import pytest
import torch

from linformer_hf import measuring
from linformer_hf.measuring import Samples, interleave, peak_bytes, timed


def test_every_case_gets_its_samples_in_rounds():
    calls = []
    cases = {name: lambda name=name: calls.append(name) or time.sleep(0.12) for name in "abc"}
    found = interleave(cases, samples=4, warm_up=1)
    assert {name: len(samples.wall) for name, samples in found.items()} == dict.fromkeys("abc", 4)
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1  # the order is drawn


def test_short_code_is_called_often_and_time_is_that_of_a_call():
    count = []
    found = interleave({"short": lambda: count.append(1) or time.sleep(0.002)}, samples=3)["short"].summary()
    assert len(count) > 30
    assert 0.002 <= found["wall_s"] < 0.02
    assert found["cpu_s"] < found["wall_s"]


def test_the_median_leaves_contended_samples_out_where_three_others_remain():
    samples = Samples(wall=[1, 2, 3, 100, 100], cpu=[1, 2, 3, 100, 100], contended=[False, False, False, True, True])
    assert samples.summary()["wall_s"] == 2
    assert samples.summary()["contended"] == 2
    samples.contended = [False, False, True, True, True]
    assert samples.summary()["wall_s"] == 3
    assert samples.summary()["wall_range_s"] == [1, 100]


@pytest.mark.parametrize(("busy", "contended"), [(0.0, False), (0.5, True)])
def test_other_processes_are_noticed(monkeypatch, busy, contended):
    clock = iter([100.0, 100.0 + busy])
    monkeypatch.setattr(measuring, "busy_seconds", lambda: next(clock))
    assert timed(lambda: time.sleep(0.1), 1)[2] is contended


def test_without_proc_stat_nothing_is_called_contended(monkeypatch):
    monkeypatch.setattr(measuring, "busy_seconds", lambda: None)
    assert timed(lambda: None, 1)[2] is False


def test_our_own_threads_are_not_other_processes():
    def spin():
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            torch.ones(200, 200) @ torch.ones(200, 200)

    thread = threading.Thread(target=spin)
    thread.start()
    _, cpu, _ = timed(lambda: time.sleep(0.2), 1)
    thread.join()
    assert cpu > 0.02  # counted as ours, so it is subtracted from what the machine did


def test_peak_is_the_most_that_was_held_at_one_moment():
    kept = torch.ones(1000, 1000)  # before: does not count

    def call():
        one = kept + 1  # 4 MB
        two = one * 2  # 8 MB
        del one
        return two.sum()

    assert 8e6 <= peak_bytes(call) < 8.1e6

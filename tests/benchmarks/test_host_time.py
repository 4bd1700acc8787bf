"""The host time of a step on a GPU is that of steps which launch."""

from conftest import script


def test_each_measured_step_launches_each_group(launches, monkeypatch):
    benchmark = script("host_time")
    monkeypatch.setattr(benchmark, "STEPS", 3)
    kept, moved = benchmark.measure("tiny", {"subspace": "columns"})
    assert kept > 0 and moved > 0
    groups = 3  # split, and with decay and without
    assert len(launches) == groups * (1 + 3 + 3)
    pointers = [given[2] for _, given, _ in launches[::groups]]
    assert len({id(each) for each in pointers}) == 4, "sent at the first step, and at each whose gradients moved"

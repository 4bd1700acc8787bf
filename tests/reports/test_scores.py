"""The table of fine-tuning runs, from records made by hand."""

import statistics

import pytest

from adafrugal.reports import records, scores, table
from adafrugal.tracking.record import Record


def made(root, data, arm, seed, last, best=None, metrics=("accuracy",), **differs):
    """A finished record; `last` and `best` are the values of the metrics."""
    record = Record(root / f"finetune-{data}-tiny" / f"{arm}-{seed}-{len(list(root.rglob('status.json')))}")
    record.begin({"seed": seed})
    labels = {"task": "finetune", "data": data, "model": "tiny", "arm": arm, "seed": seed}
    differs = {"optimizer.kind": arm, "seed": seed} | differs
    found = {"precision": "fp32", "data": {"fingerprint": data * 20}}
    record.write_environment(found | {"identity": {"labels": labels, "differs": differs}})
    names = [f"validation_{metric}" for metric in metrics]
    at = [
        {"step": step, "validation_loss": 0.5} | dict(zip(names, values, strict=True))
        for step, values in ((20, last), (10, best or last))
    ]
    state = {"start": 3 * 2**20, "end": (1 if arm == "adafrugal" else 3) * 2**20, "adamw": 4 * 2**20}
    record.write_summary({"metric": names[0], "metrics": names, "last": at[0], "best": at[1], "state_bytes": state})
    record.set_status("finished")
    return record


def rows(text, table_number=0):
    """arm -> cells of a table."""
    lines = text.split("At the ")[1 + table_number].splitlines()
    lines = [line for line in lines if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


@pytest.fixture
def two_arms(tmp_path):
    for seed, (one, other) in enumerate(((0.70, 0.60), (0.72, 0.64), (0.80, 0.50))):
        made(tmp_path, "mrpc", "adamw", seed, (one, 0.8), (0.9, 0.9), metrics=("accuracy", "f1"))
        made(tmp_path, "rte", "adamw", seed, (other,))
        made(tmp_path, "mrpc", "adafrugal", seed, (one - 0.01, 0.7), metrics=("accuracy", "f1"))
        made(tmp_path, "rte", "adafrugal", seed, (other + 0.03 + seed / 100,))
    return tmp_path


def test_cells_are_means_over_seeds_in_points(two_arms):
    found = rows(scores.markdown(records.find([two_arms])))["adamw"]
    spread = statistics.stdev([70, 72, 80])
    assert found["mrpc accuracy"] == f"74.00 ± {spread:.2f}"
    assert found["mrpc f1"] == "80.00 ± 0.00"
    assert found["n"] == "3"
    assert found["optimizer state, start → end"] == "3.00 MiB → 3.00 MiB"


def test_the_mean_is_of_first_metrics_seed_by_seed(two_arms):
    found = rows(scores.markdown(records.find([two_arms])))
    means = [65, 68, 65]
    assert found["adamw"]["mean"] == f"66.00 ± {statistics.stdev(means):.2f}"
    assert found["adamw"]["− adamw"] == "–"
    half = 4.3027 * 0.5 / 3**0.5  # Student's t with two degrees of freedom; seed by seed the difference is 1, 1.5, 2
    assert found["adafrugal"]["− adamw"] == f"+1.50 [+{1.5 - half:.2f}, +{1.5 + half:.2f}]"


def test_the_best_epoch_has_a_table_of_its_own(two_arms):
    found = rows(scores.markdown(records.find([two_arms])), 1)
    assert found["adamw"]["mrpc accuracy"] == "90.00 ± 0.00"


def test_what_did_not_run_is_missing_and_no_mean_is_made_of_the_rest(two_arms):
    made(two_arms, "cola", "adamw", 0, (0.4,), metrics=("matthews",))
    found = rows(scores.markdown(records.find([two_arms])))
    assert found["adafrugal"]["cola matthews"] == "missing"
    assert found["adafrugal"]["mean"] == "missing"
    assert found["adafrugal"]["− adamw"] == "missing"
    assert found["adafrugal"]["n"] == "0–3"
    assert found["adamw"]["mean"] == f"{(70 + 60 + 40) / 3:.2f}"  # of the one seed that has all three
    assert found["adamw"]["cola matthews"] == "40.00"


def test_one_arm_with_two_rates_is_two_rows_and_one_data_set_needs_no_mean(tmp_path):
    for lr in (3e-4, 1e-4):
        made(tmp_path, "cola", "lora", 0, (lr,), **{"optimizer.lr": lr})
    found = rows(scores.markdown(records.find([tmp_path])))
    assert list(found) == ["lora optimizer.lr=0.0001", "lora optimizer.lr=0.0003"]
    assert not {"mean", "− adamw"} & found["lora optimizer.lr=0.0001"].keys()


def test_a_rate_that_stands_at_its_default_is_named_like_the_others(tmp_path):
    other = made(tmp_path, "cola", "lora", 0, (0.1,), **{"optimizer.lr": 3e-3})
    record = made(tmp_path, "cola", "lora", 0, (0.2,))
    for each, lr in ((other, 3e-3), (record, 1e-3)):
        each.write_config({"optimizer": {"lr": lr}})
    names = list(rows(scores.markdown(records.find([tmp_path]))))
    assert names == ["lora optimizer.lr=0.001", "lora optimizer.lr=0.003"]


def test_data_sets_of_ones_own_are_told_apart_and_may_have_other_metrics(tmp_path):
    for source, metrics, values in (("a/reviews", ("accuracy",), (0.5,)), ("b/likeness", ("pearson",), (0.25,))):
        record = made(tmp_path, "labelled", "adamw", 0, values, metrics=metrics, **{"data.source": source})
        record.write_config({"data": {"source": source}})
    found = rows(scores.markdown(records.find([tmp_path])))["adamw"]
    assert (found["reviews accuracy"], found["likeness pearson"]) == ("50.00", "25.00")


def test_a_metric_that_one_run_lacks_is_missing_there(tmp_path):
    made(tmp_path, "rte", "adamw", 0, (0.5,))
    made(tmp_path, "rte", "frugal", 0, (0.25, 0.1), metrics=("accuracy", "f1"))
    found = rows(scores.markdown(records.find([tmp_path])))
    assert (found["adamw"]["rte f1"], found["frugal"]["rte f1"]) == ("missing", "10.00")


def test_both_kinds_of_runs_have_their_tables(two_arms):
    from test_reports import made as pretrained

    pretrained(two_arms, "adamw")
    text = table.markdown(records.find([two_arms]))
    assert "## pretrain embedded llama_3m" in text
    assert "## finetune tiny" in text

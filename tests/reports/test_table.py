"""Tables of runs side by side, and the summary of one, from records made by hand."""

import statistics

import pytest
from made import MIB, recorded

from adafrugal.reports import pictures, records, summary, table
from adafrugal.tracking.record import Record


@pytest.fixture
def made(tmp_path):
    """A function that makes a pre-training record of an arm."""
    return lambda arm, *args, **more: recorded(
        tmp_path, f"scale=smoke data=embedded optimizer={arm}", *args, data="ab" * 32, **more
    )


def finetuned(root, data, arm, seed, last, best=None, metrics=("accuracy",), **differs):
    """A fine-tuning record; `last` and `best` are the values of the metrics."""
    record = Record(root / f"finetune-{data}-tiny" / f"{arm}-{seed}-{len(list(root.rglob('status.json')))}")
    record.begin({"seed": seed})
    labels = {"task": "finetune", "data": data, "model": "tiny", "arm": arm, "seed": seed}
    identity = {"labels": labels, "differs": {"optimizer.kind": arm, "seed": seed} | differs}
    record.write_environment({"precision": "fp32", "data": {"fingerprint": data * 20}, "identity": identity})
    names = [f"validation_{metric}" for metric in metrics]
    at = [
        {"step": step, "validation_loss": 0.5} | dict(zip(names, values, strict=True))
        for step, values in ((20, last), (10, best or last))
    ]
    state = {"start": 3 * MIB, "end": (1 if arm == "adafrugal" else 3) * MIB, "adamw": 4 * MIB}
    record.write_summary({"metric": names[0], "metrics": names, "last": at[0], "best": at[1], "state_bytes": state})
    record.set_status("finished")
    return record


def shown(root):
    return table.markdown(records.find([root]))


def names(root):
    """The names of a table's rows, with their number of seeds."""
    return [[cell.strip() for cell in line.split("|")[1:3]] for line in shown(root).splitlines()[4:]]


def scores(root, number=0):
    """arm -> cells of the table at the last epoch (0) or at the best (1)."""
    lines = [line for line in shown(root).split("At the ")[1 + number].splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


# -- pre-training ------------------------------------------------------------------------------------------------------


def test_seeds_share_a_row_with_mean_spread_and_number(made, tmp_path):
    for seed, loss in enumerate((5.0, 5.1, 5.2)):
        made("frugal", loss, seed, state=(3, seed + 1))
    made("adamw", 4.0, state=(4, 4))
    assert shown(tmp_path) == (
        "## pretrain embedded llama_tiny\n\n"
        "| arm | n | steps | validation loss | perplexity | bits per byte | optimizer ÷ forward and backward |"
        " optimizer state, start → end |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| adamw | 1 | 20 | 4.0000 | 16.0 | 2.000 | 3.0% | 4.00 MiB → 4.00 MiB |\n"
        "| frugal | 3 | 20 | 5.1000 ± 0.1000 | 34.4 ± 2.4 | 2.550 ± 0.050 | 3.0% ± 0.0% | 3.00 MiB → 2.00 MiB |\n"
    )


def test_settings_that_affect_results_are_other_rows_and_others_are_not(made, tmp_path):
    made("frugal")
    made("frugal", seed=1, **{"trainer.log_every": 1, "data.source": "elsewhere"})
    made("frugal", seed=2, **{"trainer.compile": True, "model.loss_chunk_rows": 2048})  # of an older version
    assert names(tmp_path) == [["frugal", "3"]]
    made("frugal optimizer.lr=0.01")
    assert names(tmp_path) == [["frugal lr=0.001", "3"], ["frugal lr=0.01", "1"]]
    made("adamw", precision="fp32")
    made("adamw", seed=1)
    assert sorted(names(tmp_path))[:2] == [["adamw precision=bf16", "1"], ["adamw precision=fp32", "1"]]


def test_null_is_left_out_of_the_names_of_rows_that_are_told_apart_without_it(made, tmp_path):
    """A warm-up that is typed as the tenth that it is by default is null, too."""
    for words in ("optimizer.density.steps=10", "optimizer.interval.every=5", "schedule.warmup=5", "schedule.warmup=2"):
        made(f"adafrugal {words}")
    assert [name for name, _ in names(tmp_path)] == [
        "adafrugal", "adafrugal K=10", "adafrugal every=5", "adafrugal warmup=5"
    ]  # fmt: skip


def test_rows_that_nothing_but_a_null_tells_apart_keep_it(made, tmp_path):
    made("frugal", **{"trainer.some": None})  # as where an older version had no such setting
    made("frugal", seed=1)
    made("frugal", seed=2, **{"trainer.some": 5})
    assert [name for name, _ in names(tmp_path)] == ["frugal", "frugal some=5", "frugal some=null"]


def test_a_loss_of_nan_does_not_cost_the_table_and_unfinished_runs_are_named_below_it(made, tmp_path):
    made("adamw", float("nan"))
    failed = made("frugal")
    failed.set_status("failed")
    assert "| adamw | 1 | 20 | nan |" in shown(tmp_path)
    assert f"- not finished (failed): {failed.directory}" in shown(tmp_path)
    assert "| frugal" not in shown(tmp_path)


def test_the_estimate_of_the_memory_stands_beside_the_measurement(made, tmp_path):
    record = made("adafrugal")
    whole = record.summary()

    def with_memory(**memory):
        record.write_summary(whole | {"memory": memory})
        return summary.text(record)

    text = with_memory(estimate=99 * MIB, grown=100 * MIB, estimate_error=-0.01)
    assert "peak memory      99.00 MiB at most by the estimate; measured 100.00 MiB, by which the process grew" in text
    assert "| 99 / 100 MiB (-1.0%) |\n" in shown(tmp_path)
    text = with_memory(estimate=99 * MIB, alone=False)
    why = "since its process made other runs before, or it began with a checkpoint"
    assert f"by the estimate; not measured, {why}\n" in text  # its own, or that of trainer.continue_from
    assert "| 99 MiB / not measured |\n" in shown(tmp_path)
    measured = {"estimate": MIB, "grown": MIB, "estimate_error": 0.0, "allocated": 5}
    assert "; measured 1.00 MiB allocated, to which the estimate is +0.0%\n" in with_memory(**measured)
    replayed = with_memory(**measured, peak_is="reserved", is_upper_bound=True)  # CUDA graphs
    said = "estimate of a run that is not compiled; measured 1.00 MiB reserved, to which the estimate is +0.0%\n"
    assert said in replayed
    made("adamw")  # as older versions recorded it
    assert "peak memory" not in shown(tmp_path)


def test_a_summary_has_the_unigram_model_and_adamw_beside_the_run(made):
    record = made("adafrugal", 5.25, state=(3, 1))
    text = summary.text(record)
    assert "5.2500 nats a token, 1.25 below a unigram model's 6.5000" in text
    assert "3.00 MiB at the start, 1.00 MiB at the end; AdamW keeps 4.00 MiB" in text
    assert "2,000 tokens in 20 steps (0.50 of the text)\n" in text
    record.write_summary(record.summary() | {"epochs": None, "padding": 0.25, "validation_loss": 7.75})
    assert "1.25 above" in summary.text(record)
    assert "2,000 tokens in 20 steps (25.0% padding)\n" in summary.text(record)


@pytest.mark.parametrize(("arm", "panels"), [("adafrugal", 4), ("adamw", 2)])
def test_the_picture_of_a_run_has_its_panels_and_is_the_same_to_the_byte(made, tmp_path, arm, panels):
    record = made(arm)
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for file in (one, two):
        pictures.draw_run(record, file)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().count(b'id="axes_') == panels


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_arms(tmp_path):
    for seed, (one, other) in enumerate(((0.70, 0.60), (0.72, 0.64), (0.80, 0.50))):
        finetuned(tmp_path, "mrpc", "adamw", seed, (one, 0.8), (0.9, 0.9), metrics=("accuracy", "f1"))
        finetuned(tmp_path, "rte", "adamw", seed, (other,))
        finetuned(tmp_path, "mrpc", "adafrugal", seed, (one - 0.01, 0.7), metrics=("accuracy", "f1"))
        finetuned(tmp_path, "rte", "adafrugal", seed, (other + 0.03 + seed / 100,))
    return tmp_path


def test_scores_are_means_over_seeds_in_points_at_the_last_epoch_and_at_the_best(two_arms):
    found = scores(two_arms)["adamw"]
    assert found["mrpc accuracy"] == f"74.00 ± {statistics.stdev([70, 72, 80]):.2f}"
    assert (found["mrpc f1"], found["n"]) == ("80.00 ± 0.00", "3")
    assert found["optimizer state, start → end"] == "3.00 MiB → 3.00 MiB"
    assert scores(two_arms, 1)["adamw"]["mrpc accuracy"] == "90.00 ± 0.00"


def test_the_mean_is_of_first_metrics_seed_by_seed(two_arms):
    found = scores(two_arms)
    assert found["adamw"]["mean"] == f"66.00 ± {statistics.stdev([65, 68, 65]):.2f}"
    assert found["adamw"]["− adamw"] == "–"
    half = 4.3027 * 0.5 / 3**0.5  # Student's t with two degrees of freedom; by seed the differences are 1, 1.5, 2
    assert found["adafrugal"]["− adamw"] == f"+1.50 [+{1.5 - half:.2f}, +{1.5 + half:.2f}]"


def test_missing_scores_are_said_and_no_mean_is_made_of_the_others(two_arms):
    finetuned(two_arms, "cola", "adamw", 0, (0.4,), metrics=("matthews",))
    finetuned(two_arms, "rte", "frugal", 0, (0.25, 0.1), metrics=("accuracy", "f1"))
    found = scores(two_arms)
    assert {found["adafrugal"][name] for name in ("cola matthews", "mean", "− adamw", "rte f1")} == {"missing"}
    assert found["adafrugal"]["n"] == "0–3"
    assert found["adamw"]["mean"] == f"{(70 + 60 + 40) / 3:.2f}"  # of the one seed that has all three
    assert (found["adamw"]["cola matthews"], found["frugal"]["rte f1"]) == ("40.00", "10.00")


def test_rates_tell_rows_apart_in_their_order_and_a_default_is_named_too(tmp_path):
    for lr, differs in ((3e-3, {"optimizer.lr": 3e-3}), (1e-3, {})):
        finetuned(tmp_path, "cola", "lora", 0, (lr,), **differs).write_config({"optimizer": {"lr": lr}})
    found = scores(tmp_path)
    assert list(found) == ["lora lr=0.001", "lora lr=0.003"]
    assert not {"mean", "− adamw"} & found["lora lr=0.001"].keys(), "one data set needs no mean"


def test_data_sets_of_ones_own_are_told_apart_beside_a_table_of_pre_training(made, tmp_path):
    for source, metrics, values in (("a/reviews", ("accuracy",), (0.5,)), ("b/likeness", ("pearson",), (0.25,))):
        record = finetuned(tmp_path, "labelled", "adamw", 0, values, metrics=metrics, **{"data.source": source})
        record.write_config({"data": {"source": source}})
    found = scores(tmp_path)["adamw"]
    assert (found["reviews accuracy"], found["likeness pearson"]) == ("50.00", "25.00")
    made("adamw")
    assert shown(tmp_path).startswith("## pretrain embedded llama_tiny\n")
    assert "\n## finetune tiny\n" in shown(tmp_path)

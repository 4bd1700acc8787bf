"""Tables, summaries and pictures of small records made by hand; and that reports need no torch."""

import subprocess
import sys

import pytest

from adafrugal.reports import picture, records, summary, table
from adafrugal.tracking.record import Record


def made(root, arm, seed=0, loss=5.0, status="finished", precision="fp32", end=2**20, **differs):
    record = Record(root / "pretrain-embedded-llama_3m" / f"{arm}-{seed}-{len(differs)}{loss}{precision}")
    record.begin({"seed": seed})
    labels = {"task": "pretrain", "data": "embedded", "model": "llama_3m", "arm": arm, "seed": seed}
    differs = {"optimizer.kind": arm, "seed": seed} | differs
    found = {"precision": precision, "data": {"fingerprint": "0" * 64}}
    record.write_environment(found | {"identity": {"labels": labels, "differs": differs}})
    moving = arm == "adafrugal"
    for step in (10, 20):
        line = {"step": step, "loss": loss + 1 / step, "state_bytes": 3 * 2**20 // (step // 10)}
        line |= {"density": 0.25 / step if moving else None, "interval": step if moving else None}
        record.add_metrics(line | ({"validation_loss": loss} if step == 20 else {}))
    record.write_summary({
        "steps": 20, "tokens": 1000, "epochs": 0.5, "validation_loss": loss, "validation_perplexity": 100.0,
        "validation_bits_per_byte": 2.0, "optimizer_share": 0.031, "unigram": {"loss": 6.5, "perplexity": 665.1},
        "seconds": {"forward": 1.0, "backward": 2.0, "wall": 3.5},
        "state_bytes": {"start": 3 * 2**20, "end": end, "adamw": 4 * 2**20},
    })  # fmt: skip
    record.set_status(status)
    return record


def test_seeds_share_a_row_with_mean_spread_and_number(tmp_path):
    for seed, loss in enumerate((5.0, 5.1, 5.2)):
        made(tmp_path, "frugal", seed, loss, end=(seed + 1) * 2**20)
    made(tmp_path, "adamw", 0, 4.9)
    assert table.markdown(records.find([tmp_path])) == (
        "## pretrain embedded llama_3m\n\n"
        "| arm | n | steps | validation loss | perplexity | bits per byte | optimizer ÷ forward and backward |"
        " optimizer state, start → end |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| adamw | 1 | 20 | 4.9000 | 100.0 | 2.000 | 3.1% | 3.00 MiB → 1.00 MiB |\n"
        "| frugal | 3 | 20 | 5.1000 ± 0.1000 | 100.0 ± 0.0 | 2.000 ± 0.000 | 3.1% ± 0.0% | 3.00 MiB → 2.00 MiB |\n"
    )


def test_runs_of_one_arm_with_other_settings_are_other_rows(tmp_path):
    made(tmp_path, "frugal", 0, 5.0)
    made(tmp_path, "frugal", 1, 5.0)
    made(tmp_path, "frugal", 0, 5.5, **{"optimizer.lr": 0.01})
    rows = [line.split("|")[1:3] for line in table.markdown(records.find([tmp_path])).splitlines()[4:]]
    assert rows == [[" frugal ", " 2 "], [" frugal optimizer.lr=0.01 ", " 1 "]]


def test_what_makes_no_difference_is_no_other_row(tmp_path):
    made(tmp_path, "frugal", 0, 5.0)
    made(tmp_path, "frugal", 1, 5.0, **{"trainer.log_every": 1, "data.source": "elsewhere"})
    made(tmp_path, "frugal", 2, 5.0, **{"trainer.compile": True, "model.loss_chunk_rows": 2048})  # once a difference
    rows = [line.split("|")[1:3] for line in table.markdown(records.find([tmp_path])).splitlines()[4:]]
    assert rows == [[" frugal ", " 3 "]]


def test_runs_in_another_precision_are_another_row(tmp_path):
    made(tmp_path, "adamw", 0, 5.0)
    made(tmp_path, "adamw", 1, 5.0, precision="bf16")
    rows = [line.split("|")[1] for line in table.markdown(records.find([tmp_path])).splitlines()[4:]]
    assert rows == [" adamw precision=fp32 ", " adamw precision=bf16 "]


def test_a_run_with_a_loss_that_is_no_number_does_not_cost_the_table(tmp_path):
    made(tmp_path, "adamw", 0, 5.0)
    made(tmp_path, "frugal", 0, float("nan"))
    text = table.markdown(records.find([tmp_path]))
    assert "| frugal | 1 | 20 | nan |" in text
    assert "| adamw | 1 | 20 | 5.0000 |" in text


def test_a_summary_tells_padding_and_how_much_of_the_text_was_read_where_they_are_known(tmp_path):
    record = made(tmp_path, "adamw")
    assert "1,000 tokens in 20 steps (0.50 of the text)\n" in summary.text(record)
    record.write_summary(record.summary() | {"epochs": None})
    assert "1,000 tokens in 20 steps\n" in summary.text(record)
    record.write_summary(record.summary() | {"epochs": None, "padding": 0.25})
    assert "1,000 tokens in 20 steps (25.0% padding)\n" in summary.text(record)


def with_memory(record, **memory):
    record.write_summary(record.summary() | {"memory": memory})
    return record


def test_the_estimate_of_the_memory_stands_beside_what_was_measured(tmp_path):
    ours = with_memory(made(tmp_path, "adafrugal"), estimate=99 * 2**20, grown=100 * 2**20, estimate_error=-0.01)
    assert "memory           99.00 MiB at most by the estimate; the process grew by 100.00 MiB, with" in summary.text(
        ours
    )
    assert "peak memory" in table.markdown([ours])
    assert "| 99 / 100 MiB (-1.0%) |\n" in table.markdown([ours])
    with_memory(ours, estimate=2**20, grown=2**20, estimate_error=0.0, allocated=5)
    assert "by the estimate; 1.00 MiB allocated, to which the estimate is +0.0%\n" in summary.text(ours)
    more = {"peak_is": "reserved", "is_upper_bound": True}  # of replays of CUDA graphs
    with_memory(ours, estimate=2**20, grown=2**20, estimate_error=0.0, allocated=5, **more)
    line = "by the estimate of a run that is not compiled; 1.00 MiB reserved, to which the estimate is +0.0%\n"
    assert line in summary.text(ours)
    assert "peak memory" not in table.markdown([ours, made(tmp_path, "adamw")]), "an older record has none"


def test_what_is_not_finished_is_named_and_not_counted(tmp_path):
    made(tmp_path, "adamw")
    failed = made(tmp_path, "frugal", status="failed")
    text = table.markdown(records.find([tmp_path]))
    assert f"- not finished (failed): {failed.directory}" in text
    assert "| frugal" not in text


def test_the_summary_puts_the_unigram_model_and_adamw_beside_the_run(tmp_path):
    text = summary.text(made(tmp_path, "adafrugal", loss=5.25))
    assert "5.2500 nats a token, 1.25 below a unigram model's 6.5000" in text
    assert "3.00 MiB at the start, 1.00 MiB at the end; AdamW keeps 4.00 MiB" in text
    assert "1.25 above" in summary.text(made(tmp_path, "adamw", loss=7.75))


@pytest.mark.parametrize(("arm", "panels"), [("adafrugal", 4), ("adamw", 2)])
def test_a_picture_has_its_panels_and_is_the_same_to_the_byte(tmp_path, arm, panels):
    record = made(tmp_path, arm)
    for name in ("one.svg", "two.svg"):
        picture.draw(record, tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert one == two
    assert one.count(b'id="axes_') == panels


def test_the_command_prints_the_tables_without_torch(tmp_path):
    made(tmp_path, "adamw")
    script = (
        "import sys, runpy\n"
        "try: runpy.run_module('adafrugal.reports', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## pretrain embedded llama_3m")


def test_where_there_are_no_runs_it_says_what_to_do(tmp_path):
    command = [sys.executable, "-m", "adafrugal.reports", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there are no runs in ")
    assert "train.py" in done.stderr

"""The line below a table: what made its runs."""

from made import recorded, section

from adafrugal.reports import origin
from adafrugal.reports.arms import jobs

WORDS = "experiments=c4_60m/adamw scale=mini data=embedded"
CPU = {"device": "cpu", "processor": "A CPU", "cores": 2, "packages": {"torch": "2.13.0"}}


def test_what_all_runs_have_in_common_is_said_once_and_the_rest_is_counted(tmp_path):
    codes = ({"commit": "a" * 40, "changed": False}, {"commit": "a" * 40, "changed": True}, {"commit": "a" * 40}, None)
    for seed, code in enumerate(codes):
        run = recorded(tmp_path, WORDS, seed=seed)
        run.write_environment(run.environment() | CPU | ({"code": code} if code else {}))
        run._append("events.jsonl", {"event": "start", "time": f"2026-01-0{seed + 1}T10:00:00+0000"})
    found = section(jobs([f"-m {WORDS} seed=0,1,2,3"]), tmp_path)
    assert origin.line(found) == (
        "4 runs: code aaaaaaa (2), aaaaaaa with changes (1), not recorded (1); A CPU, 2 cores; torch 2.13.0; bf16; "
        "2026-01-01 to 2026-01-04."
    )
    run.write_environment(run.environment() | {"device": "NVIDIA H200", "cores": 16})
    assert "; A CPU, 2 cores (3), NVIDIA H200 (1); " in origin.line(found)


def test_old_records_lack_what_they_lack_and_a_table_without_runs_has_no_line(tmp_path):
    assert origin.line(section(jobs([WORDS]), tmp_path)) == ""
    recorded(tmp_path, WORDS)
    assert origin.line(section(jobs([WORDS]), tmp_path)) == "1 run: bf16."

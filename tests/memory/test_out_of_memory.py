"""Out-of-memory errors: the line, and the record."""

import pytest
import torch

from adafrugal.memory import out_of_memory
from adafrugal.memory.estimate import estimate
from adafrugal.tracking.record import Record


def test_torchs_error_on_a_cpu_is_explained(settings):
    chosen, _ = settings()
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    line = out_of_memory.reason(caught.value, chosen)
    assert line.startswith("memory was refused (")
    assert "by the estimate it takes 0.01 GiB, most in the backward phase, and there are" in line
    assert "GiB, so that something else takes the rest; what lowers it: trainer.micro_batch_size (now 8)" in line
    assert "\n" not in line


def test_what_changes_a_run_is_said_to_do_so(settings, monkeypatch):
    """In a room for nothing; what lies in the CPU's memory saves nothing on a CPU."""
    monkeypatch.setattr(out_of_memory, "_room", lambda _: (0, False))
    chosen, _ = settings("trainer.batch_size=1", "model.hidden_size=64")
    head, *cuts, last = out_of_memory.reason(MemoryError(), chosen).splitlines()
    assert "and there are 0.00 GiB; each of these, with those above it, would leave" in head
    (in_backward,) = (line for line in cuts if "trainer.update_in_backward=true" in line)
    assert "another run" not in in_backward
    assert "model.dtype=bfloat16" in cuts[-1] and ", another run" in cuts[-1]
    assert not any("state_on" in line for line in cuts) and len(cuts) <= 6
    assert last.startswith("What does not make another run may be added to the same command")


def test_other_errors_of_memory_are_explained_and_no_others(settings, monkeypatch):
    """Also where no memory is left for an estimate."""

    def refused(_):
        raise MemoryError

    monkeypatch.setattr("adafrugal.memory.savings.estimate", refused)
    chosen, _ = settings()
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        said = out_of_memory.reason(error, chosen)
        assert "trainer.micro_batch_size (now 8), trainer.sequence_length" in said
        assert said.endswith("a smaller model; docs/memory.md has what each saves") and "\n" not in said
    for error in (RuntimeError("size mismatch"), ValueError("can't allocate memory"), KeyError()):
        assert out_of_memory.reason(error, chosen) is None


@pytest.mark.gpu
def test_a_gpus_error_is_explained(settings):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert out_of_memory.reason(caught.value, settings()[0])


def test_a_run_that_is_refused_memory_goes_on_with_what_its_error_says(forks, cache_root, tmp_path, settings, tally):
    """For real, under a limit of the address space: half of the estimate, and two GiB for the libraries."""
    large = ["trainer.batch_size=128", "model.vocabulary_size=50000", "model.loss_chunk_rows=null", "trainer.steps=1"]
    peak = estimate(settings(*large)[0]).peak.total
    bound = 2 * 2**30 + peak // 2
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({bound}, resource.RLIM_INFINITY))"
    places = [f"run_root={tmp_path}", f"cache_root={cache_root}", "data.tokenizer.vocabulary_size=512"]
    words = ["scale=smoke", "tracking=local", *large, *places]
    done = forks(*words, cwd=tmp_path, before=limit)
    assert done.code == 1, done.err
    head, *cuts, last = done.err.splitlines()
    assert head.startswith("error: memory was refused (")
    assert f"by the estimate it takes {peak / 2**30:.2f} GiB" in head
    assert f"and there are {peak / 2**31:.2f} GiB" in head
    assert cuts[-1].endswith(" less, which fits")
    assert last.startswith("What does not make another run may be added to the same command")
    (status,) = tmp_path.glob("*/*/status.json")
    record = Record(status.parent)
    assert (record.status, record.reason) == ("failed", head.removeprefix("error: "))
    said = [word for line in cuts for word in line.split() if "=" in word]
    assert not any("another run" in line for line in cuts)
    again = forks(*words, *said, cwd=tmp_path, before=limit)
    assert again.code == 0, again.err
    assert Record(status.parent).status == "finished"
    tally("faults: memory is refused")

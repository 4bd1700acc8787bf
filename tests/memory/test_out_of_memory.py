"""Out-of-memory errors: the line, and the record."""

import pytest
import torch

from adafrugal.memory import out_of_memory
from adafrugal.tracking.record import Record


def test_torchs_error_on_a_cpu_is_explained(settings):
    chosen, _ = settings()
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    line = out_of_memory.reason(caught.value, chosen)
    assert line.startswith("memory was refused (")
    assert "trainer.micro_batch_size (now 8), trainer.sequence_length" in line
    assert "trainer.activation_checkpointing=layers, trainer.update_in_backward=true, optimizer.density" in line
    assert "a smaller model; the estimate of the peak is 0.01 GiB, in the backward phase; `python -m" in line
    assert "\n" not in line


def test_other_errors_of_memory_are_explained_and_no_others(settings, monkeypatch):
    """Also where no memory is left for an estimate."""

    def refused(_):
        raise MemoryError

    monkeypatch.setattr("adafrugal.memory.estimate.estimate", refused)
    chosen, _ = settings()
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        assert "a smaller model; `python -m adafrugal.memory` says" in out_of_memory.reason(error, chosen)
    for error in (RuntimeError("size mismatch"), ValueError("can't allocate memory"), KeyError()):
        assert out_of_memory.reason(error, chosen) is None


@pytest.mark.gpu
def test_a_gpus_error_is_explained(settings):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert out_of_memory.reason(caught.value, settings()[0])


def test_a_run_that_is_refused_memory_fails_with_that_line(forks, cache_root, tmp_path, tally):
    """For real, under a limit of the address space: 400,000 pieces make logits of 13 GB."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, resource.RLIM_INFINITY))"
    large = ["trainer.batch_size=128", "model.vocabulary_size=400000", "model.loss_chunk_rows=null"]
    places = [f"run_root={tmp_path}", f"cache_root={cache_root}", "data.tokenizer.vocabulary_size=512"]
    done = forks("scale=smoke", "tracking=local", *large, *places, cwd=tmp_path, before=limit)
    assert done.code == 1, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: memory was refused (")
    assert "; the estimate of the peak is " in line
    assert "trainer.micro_batch_size (now 128), trainer.sequence_length (64), model.loss_chunk_rows (null" in line
    (status,) = tmp_path.glob("*/*/status.json")
    record = Record(status.parent)
    assert (record.status, record.reason[:18]) == ("failed", "memory was refused")
    tally("faults: memory is refused")

"""Out-of-memory errors: the line, and the record."""

import resource
from pathlib import Path

import pytest
import torch

from adafrugal.memory import out_of_memory
from adafrugal.system.errors import TrainingError
from adafrugal.tracking.record import Record
from adafrugal.training.session import run


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


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_other_errors_of_memory_are_explained(settings, error):
    assert "what lowers it: " in out_of_memory.reason(error, settings()[0])


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("can't allocate memory"), KeyError()])
def test_any_other_error_is_not(settings, error):
    assert out_of_memory.reason(error, settings()[0]) is None


@pytest.mark.gpu
def test_a_gpus_error_is_explained(settings):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert out_of_memory.reason(caught.value, settings()[0])


def test_a_run_that_is_refused_memory_fails_with_that_line(settings, tally):
    """For real, under a limit of the address space: 400,000 pieces make logits of 13 GB."""
    chosen, choices = settings("trainer.batch_size=128", "model.vocabulary_size=400000", "model.loss_chunk_rows=null",
                               "data.tokenizer.vocabulary_size=512")  # fmt: skip
    pages, limits = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, limits[1]))
    try:
        with pytest.raises(TrainingError) as caught:
            run(chosen, choices)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    line = str(caught.value)
    assert line.startswith("memory was refused (")
    assert "; the estimate of the peak is " in line
    assert "trainer.micro_batch_size (now 128), trainer.sequence_length (64), model.loss_chunk_rows (null" in line
    assert "\n" not in line
    (status,) = Path(chosen.run_root).glob("*/*/status.json")
    record = Record(status.parent)
    assert (record.status, record.reason[:33]) == ("failed", "TrainingError: memory was refused")
    tally("faults: memory is refused")

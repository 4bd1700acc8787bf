"""Parameters that `fully_shard` divides over two real processes, against one process with the whole of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ARMS = (
    "blocks", "blocks, by elements", "columns", "columns, overlap kept", "columns, state in bfloat16", "lion and sgd",
    "signsgd", "slab", "slab, overlap kept", "svd", "svd, moments kept", "svd, randomized", "random",
    "columns, in the backward pass", "slab, in the backward pass", "svd, in the backward pass",
)  # fmt: skip
PROJECTED = [arm for arm in ARMS if arm.startswith(("svd", "random"))]


@pytest.fixture(scope="module")
def ranks():
    """What each of two processes found."""
    return found_on("cpu")


def found_on(device):
    script = Path(__file__).with_name("on_shards.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, str(script), device], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2
    return sorted(found, key=lambda rank: rank["rank"])


@pytest.mark.parametrize("arm", ["adamw", *ARMS])
def test_losses_of_thirty_steps_are_those_of_one_process(ranks, arm):
    rounds = "bfloat16" in arm  # sums in another order differ in their last bit, by which a moment rounds up or down
    assert ranks[0][arm]["error"] < (1e-4 if rounds else 1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_all_choose_alike_and_as_one_process_does(ranks, arm):
    one, other = ranks
    assert one[arm]["choices"] == other[arm]["choices"]
    if arm not in PROJECTED:  # bases are of gradients that differ in their last bits
        assert one[arm]["choices"] == one[arm]["as one process"]
    assert one[arm]["interval"] > 3, "T has moved"


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_says_nothing_to_the_other_process(ranks, arm):
    """Nor does a refresh, where what is chosen is drawn and not computed: bases are, by one process for all."""
    assert all(rank[arm]["silent"] for rank in ranks)
    if "backward" not in arm:  # where a basis is computed in the pass, before the step
        assert all((rank[arm]["words"] > 0) == (arm in PROJECTED) for rank in ranks)
    assert all(rank["heard"] for rank in ranks), "what listens would have heard a word"


@pytest.mark.parametrize("arm", ["adamw", "blocks", "columns"])
def test_each_keeps_about_half_of_the_state(ranks, arm):
    """The first has a row more of 13 and 21, and all of the head; lists of columns both have."""
    one, other = (rank[arm] for rank in ranks)
    assert one["bytes"] + other["bytes"] == pytest.approx(one["of"], rel=0.1)
    assert other["bytes"] < 0.5 * one["of"]
    assert one["bytes"] < 0.57 * one["of"]


@pytest.mark.parametrize("arm", ["slab", "slab, overlap kept"])
def test_the_parts_of_a_slab_make_up_the_whole_one(ranks, arm):
    one, other = (rank[arm] for rank in ranks)
    assert one["bytes"] + other["bytes"] == one["of"]


@pytest.mark.parametrize("arm", ["svd", "random"])
def test_all_have_the_bases_and_their_own_rows_of_the_moments(ranks, arm):
    one, other = (rank[arm] for rank in ranks)
    bases = one["bytes"] + other["bytes"] - one["of"]
    assert bases == one["bases"] == other["bases"] > 0


@pytest.mark.parametrize("arm", ["blocks", "columns", "signsgd", "slab", "svd", "random"])
def test_the_state_that_is_saved_is_the_whole_one(ranks, arm):
    assert all(rank[arm]["moments"] < 1e-5 for rank in ranks)


@pytest.mark.parametrize("arm", ["blocks", "columns", "slab, overlap kept", "svd"])
def test_training_goes_on_from_it_bit_for_bit(ranks, arm):
    assert [rank["resumed"][arm] for rank in ranks] == [0.0, 0.0]


@pytest.mark.parametrize("arm", ["blocks", "columns", "columns, overlap kept", "slab", "slab, overlap kept", "svd"])
def test_a_state_goes_from_one_process_to_two_and_back(ranks, arm):
    assert all(rank["crossed"][arm] < 1e-5 for rank in ranks)


def test_a_gradient_that_is_not_finite_on_one_counts_on_all(ranks):
    assert [rank["poisoned"]["skip"] for rank in ranks] == [1, 1]
    assert all("blocks.0.0.weight is not finite at step 1" in rank["poisoned"]["error"] for rank in ranks)


def test_shards_draw_noise_of_their_own(ranks):
    one, other = (torch.tensor(rank["noise"]) for rank in ranks)
    assert one.shape == other.shape
    assert 0.1 < (one != other).double().mean() < 0.9


@pytest.mark.parametrize(("name", "said"), [
    ("rows", "rows"), ("randk", "randk"), ("randperm", "randperm"), ("svd", "svd with side='smaller'"),
    ("random", "random with side='smaller'"), ("left", "svd with side='left'"),
])  # fmt: skip
def test_what_needs_whole_matrices_is_refused_by_name(ranks, name, said):
    line = f"is sharded over processes, and {said} needs the whole of it at every step; allowed: blocks, columns, slab,"
    assert all(line in rank["refused"][name] for rank in ranks)


def test_moments_that_would_move_between_processes_are_refused(ranks):
    line = "on_refresh is 'keep' and the matrices are sharded, so that a slab's moments would move to other processes"
    assert all(line in rank["refused"]["kept"] for rank in ranks)


@pytest.mark.gpu
def test_so_it_is_on_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    one, other = found_on("cuda")
    for arm in ARMS:
        assert one[arm]["error"] < 1e-3
        assert one[arm]["choices"] == other[arm]["choices"]
        assert one[arm]["silent"]

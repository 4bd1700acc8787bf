"""Parameters that `fully_shard` divides over two real processes, against one process with the whole of them."""

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from adafrugal.optim import choices
from adafrugal.optim.sharding import shards

SILENT = (
    "blocks", "blocks, by elements", "columns", "columns, overlap kept", "lion and sgd, in the backward pass",
    "row norm", "signsgd", "slab", "slab, overlap kept", "slab, state in bfloat16",
    "whiten, columns, in the backward pass",
)  # fmt: skip
BY_GRADIENT = (
    "svd", "svd, kept", "svd, in the backward pass", "svd, on a mesh of two dimensions",
    "svd, gradients that come late",
)  # fmt: skip
SAVED = ("blocks", "columns, overlap kept", "slab", "slab, overlap kept", "slab, by displacement", "svd, kept")
IN_8_BITS = ("blocks", "columns, overlap kept", "slab, kept")
BY_DISPLACEMENT = ("slab, by displacement",)
OF_MATRICES = (
    "whiten, columns", "swan, blocks", "swan, blocks, on a mesh of two dimensions", "sinkhorn, slab", "colnorm, random",
    "own norm, columns", "own column norm, blocks",
)  # fmt: skip
ARMS = (*SILENT, "slab, kept", "random", *BY_GRADIENT, *OF_MATRICES, *BY_DISPLACEMENT)


@pytest.fixture(scope="module")
def ranks(once):
    """What each of two processes found."""
    return once("shards", lambda shared: found_on("cpu", shared))


def found_on(device, directory):
    place = Path(tempfile.mkdtemp(dir=directory))
    command = [sys.executable, str(Path(__file__).with_name("on_shards.py")), device, str(place)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 13])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_rows_are_divided_as_torch_divides_them(length, processes):
    chunks = [chunk.tolist() for chunk in torch.arange(length).chunk(processes)] if length else []
    chunks += [[]] * (processes - len(chunks))
    assert [list(range(r.first, r.first + r.count)) for r in shards.row_ranges(length, processes)] == chunks


@pytest.mark.parametrize("arm", ARMS)
def test_losses_of_thirty_steps_are_those_of_one_process(ranks, arm):
    rounds = "bfloat16" in arm  # sums in another order differ in their last bit, by which a moment rounds up or down
    assert ranks[0][arm]["error"] < (1e-4 if rounds else 1e-5)
    assert ranks[0][arm]["events"], "at the same steps"


@pytest.mark.parametrize("arm", ARMS)
def test_all_choose_alike_and_as_one_process_does(ranks, arm):
    """By the checksum after each step; a basis found of gradients that were summed in another order is another."""
    one, other = ranks
    assert one[arm]["choices"] == other[arm]["choices"]
    assert arm in BY_GRADIENT or one[arm]["choices"] == one[arm]["as one process"]
    assert one[arm]["interval"] > 3, "T has moved"


@pytest.mark.parametrize("arm", BY_DISPLACEMENT)
def test_the_displacement_is_summed_over_the_processes_at_checks_alone(ranks, arm):
    """At the fourth step of a period and every second after it, up to the tenth; the longest has twelve."""
    for rank in ranks:
        starts = [*rank[arm]["refreshed"], 31]
        periods = pairwise(starts)
        assert rank[arm]["spoke"] == [s for first, end in periods for s in range(first + 3, min(end, first + 10), 2)]
        assert len(starts) > 4
    assert sum(rank[arm]["bytes"]["gradients"] for rank in ranks) == ranks[0][arm]["of"]["gradients"]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in BY_DISPLACEMENT])
def test_a_step_communicates_only_where_a_refresh_has_to(ranks, arm):
    """Or at each, for directions of whole matrices or columns."""
    for rank in ranks:
        if arm in OF_MATRICES:
            assert rank[arm]["spoke"] == list(range(1, 31))
            continue
        said = {"random", *BY_GRADIENT} - {"svd, in the backward pass"}
        moments_move = rank[arm]["refreshed"][1:] if arm == "slab, kept" else []
        assert rank[arm]["spoke"] == (rank[arm]["refreshed"] if arm in said else moments_move)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "signsgd"])
def test_together_they_keep_the_moments_of_one_process_and_each_about_half(ranks, arm):
    """The first has a row more of 13 and 21, and all of the head; of a slab one may have all."""
    one, other = (rank[arm]["bytes"]["moments"] for rank in ranks)
    whole = ranks[0][arm]["of"]["moments"]
    assert one + other == whole
    if "slab" not in arm:
        assert other < 0.5 * whole
        assert one < (0.65 if "blocks" in arm else 0.57) * whole


@pytest.mark.parametrize("arm", ["svd", "svd, kept", "random"])
def test_bases_are_on_every_process_and_counted_apart(ranks, arm):
    assert all(rank[arm]["bytes"]["basis"] == rank[arm]["of"]["basis"] > 0 for rank in ranks)


def test_matrices_whose_gradients_come_late_choose_late(ranks):
    assert all(rank["svd, gradients that come late"]["late"] for rank in ranks)


def test_the_processes_find_bases_at_the_same_time(ranks):
    """Five at each of three refreshes."""
    assert [rank["owned"] for rank in ranks] == [{"found": [3, 3, 3], "of": 5}, {"found": [2, 2, 2], "of": 5}]


def test_the_processes_make_directions_at_the_same_time_or_share_sums(ranks):
    """Of five matrices in three rounds, by one gather and one scatter each; or all at once."""
    directed = [rank["directed"] for rank in ranks]
    assert [each["whiten"]["made"] for each in directed] == [3, 2]
    for each in directed:
        assert sorted(each["whiten"]["collectives"].values()) == [5, 5]
        assert list(each["sinkhorn"]["collectives"].values()) == [5], "rounds, whatever the number of matrices"
        assert list(each["colnorm"]["collectives"].values()) == [1]
        assert each["rownorm"]["collectives"] == {}


# -- gradients that are not finite, on one process alone --------------------------------------------------------------


def test_all_skip_the_step_and_go_on_alike(ranks):
    one, other = (rank["skipped"]["skip"] for rank in ranks)
    assert one == other
    assert (one["skipped"], one["changed"], one["said"]) == (1, False, None)
    assert one["spoke"] == [1, 2, 4, 5], "each step looks at all gradients"


def test_all_refuse_the_step_and_name_the_parameter(ranks):
    one, other = (rank["skipped"]["error"] for rank in ranks)
    assert one == other
    assert "the gradient of parameter blocks.1.2.weight is not finite at step 3" in one["said"]
    assert not one["changed"]


def test_all_keep_the_basis_and_count_it(ranks):
    one, other = (rank["kept"] for rank in ranks)
    assert one == other
    assert one["kept"] == 1


@pytest.mark.parametrize("arm", ["blocks", "columns", "slab", "swan, blocks"])
def test_stochastic_rounding_draws_what_one_process_does(ranks, arm):
    assert all(rank["rounded"][arm] for rank in ranks)


# -- states that are saved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "bfloat16" not in arm])
def test_the_state_that_is_saved_is_the_whole_one(ranks, arm):
    assert all(rank[arm]["moments"] < 1e-5 for rank in ranks)


@pytest.mark.parametrize("arm", SAVED)
def test_training_goes_on_from_it_on_as_many_processes_and_on_others(ranks, arm):
    for rank in ranks:
        apart = rank["resumed"][arm]
        assert apart["on as many"] == 0.0
        assert max(apart["on one"], apart["from one"]) < 1e-5


@pytest.mark.parametrize("arm", SAVED)
def test_torchs_checkpoint_brings_it_to_a_fresh_optimizer_and_reading_it_changes_nothing(ranks, arm):
    assert all(rank["checkpointed"][arm] == {"apart": 0.0, "from one": 0.0} for rank in ranks)


@pytest.mark.parametrize("arm", IN_8_BITS)
def test_moments_in_8_bits_are_those_of_one_process_and_go_on_bit_for_bit(ranks, arm):
    for rank in ranks:
        assert rank["in 8 bits"][arm] == {
            "as one": True, "resumed": 0.0, "checkpointed": {"apart": 0.0, "from one": 0.0},
        }  # fmt: skip


def test_a_part_of_a_moment_is_not_taken_for_the_whole(ranks):
    for rank, rows in zip(ranks, (6, 5), strict=True):
        line = f"the saved exp_avg of parameter blocks.0.0.weight has shape [{rows}, 13]; its whole has [11, 13]"
        assert line in rank["refused state"]


def test_a_whole_tensor_lies_as_a_parameter_does_without_a_word(ranks):
    assert all(rank["as shards lie"] for rank in ranks)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "randk", "randperm", "svd", "random", "svd, left"])
def test_subspaces_that_need_whole_matrices_are_refused(ranks, kind):
    for said in (rank["refused"][kind] for rank in ranks):
        assert f"is sharded over processes and the subspace is {{'kind': '{kind.split(',')[0]}'" in said
        assert f"which needs whole matrices; allowed: {choices.ON_SHARDS}" in said


def test_rules_that_see_lines_refuse_matrices_that_are_not_divided_by_rows(ranks):
    for said in (said for rank in ranks for said in rank["refused layout"].values()):
        assert said == "parameter number 0 is sharded as (Shard(dim=1),); allowed: along its first axis, over one " + (
            "dimension of the mesh"
        )


@pytest.mark.gpu
def test_so_it_is_on_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    one, other = found_on("cuda", tmp_path)
    for arm in ARMS:
        assert one[arm]["error"] < 1e-3
        assert one[arm]["choices"] == other[arm]["choices"]
        assert arm not in SILENT or not one[arm]["spoke"]

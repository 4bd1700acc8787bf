"""Which tensors share a launch, what a launch moves, and what is seen of changes between two steps."""

import itertools
import warnings
import weakref

import pytest
import torch
from own_parts import RULES
from stepping import events_of, frugal, matrices, same, stepped

from adafrugal.optim import Frugal, LinearDecay, updates
from adafrugal.optim.kernels import tables
from adafrugal.optim.kernels.tables import Table

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("subspace", ["blocks", "slab", "rows", "columns"])
def test_a_step_is_one_launch_a_group_and_tables_are_kept(subspace, launches, monkeypatch):
    built = []
    monkeypatch.setattr(Table, "__init__", lambda *given: (built.append(given), init(*given))[1], raising=True)
    params = [torch.nn.Parameter(torch.randn(16, 24)) for _ in range(4)]
    rest = [torch.nn.Parameter(torch.randn(24)) for _ in range(3)]
    optimizer = Frugal([{"params": params, "split": True}, {"params": rest}], subspace=subspace, interval=3)
    grads = [torch.randn_like(param) for param in params + rest]
    for step in range(6):
        for param, grad in zip(params + rest, grads, strict=True):
            param.grad = grad if step else grad.clone()
        optimizer.step()
    assert len(launches) == 2 * 6
    assert len(built) == 2 * 2, "at each refresh"
    sent = [given[2] for _, given, _ in launches[2::2]]
    assert all(one is other for one, other in itertools.pairwise(sent[:2])), "pointers that stay are not sent again"


@pytest.mark.parametrize("subspace", ["blocks", "slab", "rows", "columns", "randperm"])
@pytest.mark.parametrize("density", [0.0, 0.25])
def test_a_launch_moves_the_bytes_that_must_move(subspace, density, launches):
    """28 bytes for an entry with AdamW's state in float32, 12 for one without, of each entry once."""
    from adafrugal.optim.kernels import one_pass

    params, rest = matrices([(64, 40), (40, 64), (7, 130)]), torch.nn.Parameter(torch.randn(33))
    optimizer = Frugal(
        [{"params": params, "split": True, "density": density}, {"params": [rest]}], subspace=subspace, compile=False
    )
    stepped(optimizer, [0])
    moved = selected = 0
    reached = []
    for _, (owners, table, *_), _ in launches:
        rows = [dict(zip(one_pass.COLUMNS, row, strict=True)) for row in table.tolist()]
        programs = torch.bincount(owners, minlength=len(rows)).tolist()
        for row, runs in zip(rows, programs, strict=True):
            tiles = -(-row["size"] // one_pass.BLOCK)
            assert runs * one_pass.RUN >= tiles > (runs - 1) * one_pass.RUN, "no program without work, but a run's last"
            with_state = {"free": 0, "full": row["size"]}.get(one_pass.KINDS[row["kind"]])
            if with_state is None:  # lines with a place among the selected
                param = next(p for p in params if p.data_ptr() == row["weight"])
                with_state = optimizer.state[param]["entries"]
                assert row["size"] // row["length"] * row["width"] == with_state or row["width"] == row["length"]
            moved, selected = moved + 12 * row["size"] + 16 * with_state, selected + with_state
            reached += range(row["weight"], row["weight"] + 4 * row["size"], 4)
    entries = sum(param.numel() for param in (*params, rest))
    assert selected == optimizer.selected_entries() + rest.numel()
    assert moved == 12 * entries + 16 * selected
    assert len(set(reached)) == len(reached) == entries


def test_matrices_of_a_shape_are_updated_in_one_batch(monkeypatch):
    batches = []
    monkeypatch.setattr(updates, "_update_projected", lambda targets, *_: batches.append(len(targets)))
    monkeypatch.setattr(updates, "_IN_A_BATCH", 3 * 16 * 24)
    stepped(frugal(matrices([(16, 24), (24, 16)] * 4), subspace="svd", compile=False), [0])
    assert batches == [3, 1, 3, 1]


def test_a_batch_ends_in_one_launch(kernel, monkeypatch):
    from adafrugal.optim.kernels import one_pass

    made = []

    class Stub:
        def __getitem__(self, grid):
            return lambda weights, rest, moved, tiles, size, *_, **__: made.append((*grid, len(weights), tiles, size))

    monkeypatch.setattr(one_pass, "close", Stub())
    stepped(frugal(matrices([(16, 24), (24, 32)] * 2), subspace="svd", compile=False), [0])
    assert made == [(2 * 2, 2, 2, 16 * 24), (2 * 3, 2, 3, 24 * 32)]


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_rates_may_be_tensors_that_the_kernel_reads(monkeypatch):
    ends = []
    for as_tensor in (False, True):
        params = matrices([(16, 24)])
        rates = {"lr": 0.1, "weight_decay": 0.1, "split_lr_scale": 0.5, "state_free_lr_scale": 0.3}
        optimizer = frugal(params, subspace="columns", capturable=True, **rates)
        if as_tensor:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
            monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # as if on the GPU
            monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: pytest.fail("the host waits for the GPU"))
        ends.append(stepped(optimizer, range(3)).param_groups[0]["params"])
    torch.testing.assert_close(*ends)


@pytest.fixture
def recording(monkeypatch):
    """A function that says, from then on, that a CUDA graph is being recorded."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


@pytest.mark.parametrize(
    ("subspace", "options", "change", "why"),
    [
        ("columns", {"capturable": False}, None, "capturable is False"),
        ("columns", {"interval": 2}, None, r"its subspace moves; ask can_replay\(\) before"),
        ("columns", {}, lambda p: setattr(p, "grad", p.grad.clone()), "its gradients have moved"),
        ("columns", {}, lambda p: setattr(p, "data", p.data.clone()), "make one before with the same tensors"),
        ("columns", {"lr": torch.tensor(0.1)}, None, "lr is a tensor on the CPU"),
        ("svd", {}, None, "some tensors of a group are not updated in one launch"),
    ],
)
def test_a_step_that_cannot_be_recorded_says_why(subspace, options, change, why, launches, recording):
    params = matrices([(16, 24)])
    optimizer = stepped(
        frugal(params, **{"subspace": subspace, "capturable": True, "compile": False} | options), [0, 1]
    )
    if change:
        change(params[0])
    recording()
    clocks = dict(optimizer.param_groups[0])
    with pytest.raises(RuntimeError, match=f"a CUDA graph cannot record this step of Frugal: {why}"):
        optimizer.step()
    assert optimizer.param_groups[0] == clocks, "it has not been made"


def test_rounding_that_is_set_later_is_not_recorded(launches, recording):
    optimizer = stepped(frugal(matrices([(16, 24)]), density=0.0, capturable=True), [0, 1])
    optimizer.param_groups[0]["stochastic_rounding"] = True
    recording()
    with pytest.raises(RuntimeError, match="stochastic_rounding would repeat its noise"):
        optimizer.step()


def test_codes_that_begin_later_are_not_recorded(launches, recording):
    optimizer = frugal(matrices([(64, 64)]), density=1.0, capturable=True)
    optimizer.param_groups[0]["state_dtype"] = "int8"
    stepped(optimizer, [0, 1])
    recording()
    with pytest.raises(RuntimeError, match="moments in 8 bits would repeat their noise"):
        optimizer.step()


@pytest.mark.parametrize("subspace", ["blocks", "slab", "rows", "columns"])
def test_codes_and_what_keeps_no_state_share_a_launch(subspace, launches):
    params, rest = matrices([(64, 64), (64, 64), (100, 60)]), matrices([(8000, 8), (9,)])
    groups = [{"params": params, "split": True}, {"params": rest}]
    stepped(Frugal(groups, subspace=subspace, density=0.5, state_dtype="int8"), [0])
    of_codes = [given[5].dtype == torch.int8 for _, given, _ in launches]
    assert of_codes == [True, False], "the second group's are a vector, and rows that are too short"


@pytest.mark.parametrize(
    "change", [{"exp_avg_sq_scale": torch.ones(64, 1, device="meta")}, {"exp_avg_sq": torch.ones(64, 64)}]
)
def test_codes_without_scales_here_or_of_one_moment_are_left_to_torch(change, launches):
    params = matrices([(64, 64)])
    optimizer = stepped(frugal(params, density=1.0, state_dtype="int8"), [0])
    assert updates._member(optimizer.param_groups[0], optimizer.state, 0)
    optimizer.state[params[0]].update(change)
    assert updates._member(optimizer.param_groups[0], optimizer.state, 0) is None


def test_a_device_is_not_tried_while_recording(recording, monkeypatch):
    monkeypatch.undo()
    tables.work_on.cache_clear()
    recording()
    with pytest.raises(RuntimeError, match="make one before"):
        tables.work_on(torch.device("cuda", 7))
    assert tables.work_on.cache_info().currsize == 0


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 0.5}, {"split": False}])
def test_a_step_can_be_replayed_when_tables_are_made(options, launches):
    optimizer = Frugal([{"params": matrices([(16, 24)]), "split": True} | options], subspace="columns", interval=3)
    could = []
    for step in range(5):
        could.append(optimizer.can_replay())
        stepped(optimizer, [step])
    moves = options.get("density") == 0.5
    assert could == [False, True, True, not moves, True]
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.can_replay()


def test_no_step_is_replayed_while_matrices_wait(launches):
    params = matrices([(16, 24), (16, 24)])
    optimizer = frugal(params, subspace="columns", interval=4, stagger=2)
    could = []
    for step in range(8):
        could.append(optimizer.can_replay())
        stepped(optimizer, [step])
    assert could == [False, True, True, True, False, False, True, True]


def test_a_step_whose_tensors_keep_their_places_is_recorded(launches, recording):
    optimizer = stepped(frugal(matrices([(16, 24)]), subspace="columns", capturable=True), [0, 1])
    recording()
    optimizer.step()
    assert len(launches) == 3


def test_counted_replays_move_the_clocks_as_steps_do():
    ends = []
    for replayed in (False, True):
        optimizer = frugal(
            matrices([(16, 24)]), density=LinearDecay(0.5, 0.1, steps=12), interval=5, subspace="columns"
        )
        events = events_of(optimizer)
        for step in range(16):
            if replayed and optimizer.can_replay():
                optimizer.count_replay()
            else:
                stepped(optimizer, [step])
        ends.append((events, optimizer.checksum()))
    assert ends[0] == ends[1]
    with pytest.raises(RuntimeError, match="replayed at a step that differs"):
        while True:
            optimizer.count_replay()


@pytest.mark.parametrize("option", [{"stochastic_rounding": True}, {"state_dtype": "int8"}, {"nonfinite": "skip"}])
def test_what_a_replay_would_repeat_is_refused_with_capturable(option):
    with pytest.raises(ValueError, match=f"capturable with {next(iter(option))}.*: a CUDA graph would repeat"):
        frugal(matrices(), capturable=True, **option)


def test_moments_elsewhere_are_refused_with_capturable():
    with pytest.raises(ValueError, match="capturable with state_on cpu_always_full: a CUDA graph would not copy"):
        frugal(matrices(), capturable=True, state_on="cpu_always_full")


@pytest.mark.parametrize("arguments", [{"fused": None}, {"foreach": True}, {"foreach": False, "fused": True}])
def test_arguments_of_torchs_optimizers_are_accepted(arguments):
    ends = [stepped(frugal(matrices(), **given), range(3)).param_groups[0]["params"] for given in ({}, arguments)]
    assert same(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("subspace", ["blocks", "columns"])
def test_a_recorded_step_is_the_step(subspace):
    """Record after each move of the subspace, replay until the next."""
    ends = []
    for recorded in (False, True):
        params = matrices([(64, 96), (96, 64), (64, 64)], device="cuda")
        lr = torch.tensor(0.01, device="cuda") if recorded else 0.01
        optimizer = frugal(params, lr=lr, subspace=subspace, interval=4, capturable=True, density=0.5)
        generator, graph = torch.Generator("cuda").manual_seed(0), None
        for param in params:
            param.grad = torch.zeros_like(param)
        for step in range(12):
            for param in params:
                param.grad.normal_(generator=generator)
            if recorded:
                lr.fill_(0.01 / (1 + step))
            else:
                optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            if not recorded or not optimizer.can_replay():
                optimizer.step()
                graph = None
            elif graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
                graph.replay()
            else:
                graph.replay()
                optimizer.count_replay()
        ends.append([*params, *(value for p in params for value in optimizer.state[p].values())])
    torch.testing.assert_close(*ends)


init = Table.__init__


def offload(optimizer, param):
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][name] = optimizer.state[param][name].clone()


def recount(optimizer, param):
    optimizer.state[param]["step"] = torch.tensor(100.0)


def forget(optimizer, param):
    entries = optimizer.state[param]["entries"]
    optimizer.state.clear()
    optimizer.state[param]["entries"] = entries


def forget_moments(optimizer, param):
    for name in ("exp_avg", "exp_avg_sq", "step"):
        del optimizer.state[param][name]


def move(optimizer, param):
    param.data = param.data.clone()


def rescale(optimizer, param):
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        if name in optimizer.state[param]:
            optimizer.state[param][name] = optimizer.state[param][name] * 2


def transpose(optimizer, param):
    param.data = param.data.t().contiguous().t()


def replace_rule(optimizer, param):
    optimizer.param_groups[0]["state_full"] = "adamw"
    optimizer.param_groups[0]["state_free"] = "sgd"


def round_otherwise(optimizer, param):
    optimizer.param_groups[0]["stochastic_rounding"] = True


def copy_all(optimizer, param):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [offload, recount, forget, forget_moments, move, rescale, transpose, replace_rule, round_otherwise, copy_all],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_what_is_changed_between_two_steps_is_seen(state_dtype, change, codes):
    """As the plain form sees it, which reads everything anew at each step."""
    ends = []
    for fused in (False, True):
        params = matrices([(16, 24), (8, 8)])
        optimizer = frugal(params, density=1.0, fused=fused, compile=False, lr=0.1, state_dtype=state_dtype)
        stepped(optimizer, range(3))
        change(optimizer, params[0])
        stepped(optimizer, range(3, 6))
        state = optimizer.state[params[0]]
        ends.append([*(param.detach() for param in params), state["exp_avg"], state["step"]])
    torch.testing.assert_close(ends[1], ends[0])


def test_a_parameter_that_takes_the_place_of_another_is_updated():
    params = matrices([(16, 24), (8, 8)])
    optimizer = stepped(frugal(params, density=0.0, lr=1.0), [0])
    new = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer.param_groups[0]["params"][0] = new
    params[0].grad, new.grad = None, torch.ones(16, 24)
    optimizer.step()
    assert torch.equal(new, -torch.ones(16, 24))


def test_moments_elsewhere_than_their_weights_are_left_to_torch(launches):
    params = matrices([(16, 24)])
    optimizer = stepped(frugal(params, density=1.0, fused=False, compile=False), [0])
    optimizer.param_groups[0]["fused"] = True
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].to("meta")
    before = len(launches)
    assert updates._member(optimizer.param_groups[0], optimizer.state, 0) is None
    assert len(launches) == before


def test_a_device_on_which_nothing_can_be_launched_is_said_once(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(tables, "Table", lambda *_, **__: 1 / 0)
    tables.work_on.cache_clear()
    zeros, device = torch.zeros, torch.device("cuda", 7)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **named: zeros(*size, **named))
    with pytest.warns(UserWarning, match=r"Triton does not work here \(division by zero\); Frugal uses torch's own"):
        assert not tables.work_on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tables.work_on(device)
    tables.work_on.cache_clear()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "svd"])
def test_a_rule_that_the_kernel_lacks_leaves_it_the_tensors_selected_whole(subspace, rule, monkeypatch):
    tables_of, ends = [], []
    monkeypatch.setattr(Table, "__init__", lambda *given: (tables_of.append(given[1]), init(*given))[1])
    for fused in (False, True):
        params, other = matrices([(16, 24), (8, 8), (8, 8), (16, 24)]), matrices([(8, 8)], seed=1)
        groups = [{"params": params, "split": True}, {"params": other}]
        optimizer = Frugal(groups, subspace=subspace, state_free=rule, density=0.5, fused=fused, compile=False, lr=0.1)
        stepped(optimizer, range(3))
        ends.append([param.detach() for param in params + other])
    torch.testing.assert_close(*ends)
    in_tables = {id(member.param) for members in tables_of for member in members}
    whole = {id(param) for param in params[2:]} if subspace == "blocks" else set()
    assert in_tables == whole | {id(other[0])}


@pytest.mark.parametrize("device", DEVICES)
def test_no_gradient_outlives_zero_grad(device):
    param = torch.nn.Parameter(torch.randn(16, 24).to(device))
    optimizer = Frugal([{"params": [param], "split": True}], subspace="columns")
    param.grad = torch.randn_like(param)
    storage = weakref.ref(param.grad.untyped_storage())
    optimizer.step()
    optimizer.zero_grad()
    assert storage() is None

import pytest
import torch
from torch import nn

from adafrugal.optim import Frugal, Rule, default_rules, split_parameters


class Model(nn.Module):
    """A scalar, a tied head, a convolution, biases, a Linear outside the blocks, eleven blocks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(11))
        self.convolution = nn.Conv1d(4, 4, 3)
        self.pooler = nn.Linear(4, 4)
        self.layers_norm = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.ones(()))


OTHERS = Rule("others", "state_full")


def names(groups, rule):
    return [name for group in groups if group["rule"] == rule for name, _ in group["params"]]


def kinds(groups):
    pairs = zip(groups, groups.counts(), strict=False)
    return {name: kind for group, (_, kind, _, _) in pairs for name, _ in group["params"]}


def test_only_linear_weights_inside_blocks_are_split_and_every_trainable_tensor_is_in_one_group():
    model = Model()
    model.layers[3].requires_grad_(False)
    groups = split_parameters(model)
    assert names(groups, "Linear in blocks") == [f"layers.{i}.1.weight" for i in range(11) if i != 3]
    others = ["embedding.weight", "convolution.weight", "pooler.weight", "layers_norm.weight"]
    assert names(groups, "other matrices") == others
    assert {"temperature", "pooler.bias", "layers.10.1.bias"} <= set(names(groups, "vectors, scalars"))
    found = [id(p) for group in groups for _, p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_table_counts_tensors_parameters_and_bytes():
    model = Model()
    table = str(split_parameters(model)).splitlines()
    total = sum(p.numel() for p in model.parameters())
    assert table[1].split() == ["Linear", "in", "blocks", "split", "11", "176", "1,408"]
    assert table[-1].split() == ["all", str(len(list(model.parameters()))), str(total), f"{8 * total:,}"]
    assert len({len(line) for line in table}) == 1


def test_groups_serve_more_than_one_optimizer_can_be_changed_and_still_print():
    groups = split_parameters(Model())
    before = str(groups)
    for group in groups:
        group["lr"] = 7.0
    first, second = Frugal(groups), Frugal(groups)
    assert [g["lr"] for g in first.param_groups] == [7.0, 7.0, 7.0]
    assert first.param_groups[0]["param_names"] == second.param_groups[0]["param_names"]
    adamw = torch.optim.AdamW(groups, weight_decay=0.1)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.1, 0.0]
    assert str(groups) == before


# -- rules ------------------------------------------------------------------------------------------------------------


def test_norms_embeddings_and_head_can_be_moved():
    groups = split_parameters(Model(), default_rules(embeddings="state_full", norms="state_free", head="split"))
    kind = kinds(groups)
    assert kind["layers.3.0.weight"] == kind["layers.10.0.bias"] == "state-free"
    assert kind["pooler.weight"] == kind["layers_norm.weight"] == "split"
    assert kind["embedding.weight"] == "state-full", "tied to the head, but kept where one place keeps it"
    assert kind["layers.10.1.weight"] == "split"
    assert kind["temperature"] == "state-full"
    assert groups[0]["rule"] == "Linear in blocks, head", "one group: blocks take turns within a group"
    optimizer = Frugal(groups)  # vectors can be state-free, and blocks take anything
    assert next(g for g in optimizer.param_groups if g["rule"] == "norms")["density"].at(1) == 0.0


def test_modules_may_have_a_factor_on_the_density():
    scales = {"layers.1?.1": 2.0, "layers.1.1|layers.2.1": 0.5, "layers.[0-4].1": 1.5}
    groups = split_parameters(Model(), default_rules(density_scale=scales))
    found = {g.get("density_scale"): [name.split(".")[1] for name, _ in g["params"]] for g in groups if g["split"]}
    assert found == {2.0: ["10"], 0.5: ["1", "2"], 1.5: ["0", "3", "4"], None: ["5", "6", "7", "8", "9"]}
    assert default_rules(density_scale={}) == default_rules()
    groups = split_parameters(Model(), default_rules(density_scale={"layers.1.1": 2}, split=["layers.2.1"]))
    assert [(g["rule"], g.get("density_scale"), g.get("density")) for g in groups[:3]] == [
        ("layers.1.1", 2, None), ("layers.2.1", None, None), ("other Linear in blocks", None, 0.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("embeddings", "head", "expected"),
    [("split", "split", "split"), ("state_free", "split", "split"), ("frozen", "state_free", "state-free")],
)
def test_a_tied_tensor_is_in_one_group_and_the_place_that_keeps_most_decides(embeddings, head, expected):
    groups = split_parameters(Model(), default_rules(embeddings=embeddings, head=head))
    assert kinds(groups)["embedding.weight"] == expected


def test_the_split_of_the_glue_scripts():
    """FACTS §5: query and value with a subspace, other matrices state-free, embeddings frozen, the rest AdamW."""
    model = nn.ModuleDict({
        "embeddings": nn.ModuleDict({"word": nn.Embedding(9, 4), "LayerNorm": nn.LayerNorm(4)}),
        "layer": nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value")}) for _ in range(2)
        ),
        "classifier": nn.Linear(4, 2),
    })  # fmt: skip
    rules = [
        Rule("embeddings", "frozen", path="embeddings.*"),
        Rule("query", "split", (nn.Linear,), path="*.query", tensors="matrices", settings={"density": 0.5}),
        Rule("value", "split", (nn.Linear,), path="layer.?.value", tensors="matrices"),
        Rule("matrices", "state_free", (nn.Linear,), in_blocks=True, tensors="matrices"),
        OTHERS,
    ]
    groups = split_parameters(model, rules)
    assert [g["rule"] for g in groups] == ["query", "value", "matrices", "others", "others"]
    assert groups[0]["density"] == 0.5
    assert names(groups, "matrices") == ["layer.0.key.weight", "layer.1.key.weight"]
    assert not any(p.requires_grad for p in model["embeddings"].parameters())
    frozen = [f"embeddings.{name}" for name in ("word.weight", "LayerNorm.weight", "LayerNorm.bias")]
    assert [name for name, _ in groups.frozen] == frozen
    table = str(groups).splitlines()
    assert table[3].split() == ["matrices", "state-free", "2", "32", "0"]
    assert table[-2].split() == ["frozen", "frozen", "3", "44", "0"]
    params = list(model.parameters())
    assert table[-1].split()[1:3] == [str(len(params)), str(sum(p.numel() for p in params))]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers.1.1", ["layers.1.1.weight"]),  # and not layers.10
        ("*.1?.1", ["layers.10.1.weight"]),
        ("layers.0.1|layers.1.1", ["layers.0.1.weight", "layers.1.1.weight"]),
    ],
)
def test_a_pattern_is_compared_part_by_part(path, expected):
    groups = split_parameters(Model(), [Rule("these", "split", path=path, tensors="matrices"), OTHERS])
    assert names(groups, "these") == expected


def test_what_decays_can_be_said():
    all_of_blocks = Rule("all", "split", (nn.Linear,), in_blocks=True, decayed=True)
    groups = split_parameters(Model(), [all_of_blocks, Rule("others", "state_full", decayed=False)])
    assert [g.get("weight_decay") for g in groups] == [None, 0.0]
    assert "layers.0.1.bias" in names(groups, "all")


def test_layers_are_numbered_over_all_lists_by_their_outermost_member():
    def linear(n):
        return nn.ModuleList(nn.Linear(2, 2) for _ in range(n))

    experts = nn.ModuleList(nn.ModuleDict({"experts": linear(2)}) for _ in range(2))
    (group, _) = split_parameters(nn.ModuleDict({"encoder": experts, "decoder": linear(1)}))
    assert group["layers"] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([Rule("typo", "split", path="*.qurey"), OTHERS], "no trainable tensor falls under the rule 'typo'"),
        (
            [Rule("blocks", "split", in_blocks=True), Rule("scalar", "frozen", path="")],
            r"embedding.weight \(10, 4\) in a Embedding falls under no rule",
        ),
        ([Rule("ice", "frozen", path="convolution"), OTHERS], "nothing to split in Model.*make the groups yourself"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_an_error_and_freeze_nothing(rules, says):
    model = Model()
    with pytest.raises(ValueError, match=says):
        split_parameters(model, rules)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("key", "value"), [("treatment", "statefull"), ("tensors", "biases")])
def test_a_rule_that_cannot_be_is_refused(key, value):
    with pytest.raises(ValueError, match=f"rule 'x': {key} is '{value}'; allowed: "):
        Rule(**{"name": "x", "treatment": "split", key: value})


# -- encoders, as fine-tuning treats them -----------------------------------------------------------------------------

SPLIT = ["*.query|*.q", "*.value|*.v"]


def encoder(kind, **shape):
    """A sequence classifier of transformers without storage, by default in its own default shape."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**shape)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForSequenceClassification")(config)


@pytest.mark.parametrize(
    ("kind", "query", "value"),
    [
        ("Roberta", "roberta.encoder.layer.{}.attention.self.query", "roberta.encoder.layer.{}.attention.self.value"),
        ("Bert", "bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.attention.self.value"),
        ("MPNet", "mpnet.encoder.layer.{}.attention.attn.q", "mpnet.encoder.layer.{}.attention.attn.v"),
    ],
)
def test_query_and_value_of_encoders_are_split_and_embeddings_frozen(kind, query, value):
    model = encoder(kind)
    groups = split_parameters(model, default_rules(embeddings="frozen", split=SPLIT))
    split, free, *full = groups
    assert {n for n, _ in split["params"]} == {f"{p.format(i)}.weight" for p in (query, value) for i in range(12)}
    assert len(free["params"]) == 48
    assert free["density"] == 0.0
    assert all("encoder.layer" in n and n.endswith(".weight") and "LayerNorm" not in n for n, _ in free["params"])
    frozen = {name for name, _ in groups.frozen}
    assert frozen == {n for n, _ in model.named_parameters() if "embeddings" in n or "attention_bias" in n}
    assert any("embeddings.LayerNorm" in name for name in frozen)
    for group in full:
        assert not group["split"]
        undecayed = [n for n, _ in group["params"] if n.endswith("bias") or "LayerNorm" in n]
        assert undecayed == ([n for n, _ in group["params"]] if group.get("weight_decay") == 0.0 else [])
    heads = {n for n, p in full[0]["params"] if p.ndim > 1}
    assert heads == {n for n, p in model.named_parameters() if ("classifier" in n or "pooler" in n) and p.ndim > 1}


@pytest.mark.parametrize(("rank", "mebibytes"), [(8, 6.56), (0, 5.43)])
def test_roberta_base_has_the_sizes_of_frugals_scripts(rank, mebibytes):
    """FACTS: 14.16M entries in query and value, 70.78M state-free, 0.71M with AdamW."""
    model = encoder("Roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    groups = split_parameters(model, default_rules(embeddings="frozen", split=SPLIT))
    sizes = [sum(p.numel() for _, p in group["params"]) for group in groups]
    assert [round(size / 1e6, 2) for size in sizes[:2]] == [14.16, 70.78]
    assert round(sum(sizes[2:]) / 1e6, 2) == 0.71
    optimizer = Frugal(groups, lr=1e-4, density=rank / 768, interval=500, subspace="columns")
    for param in model.parameters():
        param.grad = torch.empty_like(param)
    optimizer.step()
    moments = optimizer.state_bytes().by_role()["moments"]
    assert round(moments / 2**20, 2) == mebibytes


@pytest.mark.parametrize("treatment", ["state_full", "split", "frozen"])
def test_what_is_not_named_may_be_split_state_full_or_frozen_too(treatment):
    groups = split_parameters(encoder("Bert"), default_rules(split=["*.query"], unsplit=treatment))
    found = kinds(groups) | {name: "frozen" for name, _ in groups.frozen}
    assert {kind for name, kind in found.items() if name.endswith("self.key.weight")} == {treatment.replace("_", "-")}


# -- modules that are no Linear ---------------------------------------------------------------------------------------


class Expert(nn.Module):
    """A module of one's own with matrices in it."""

    def __init__(self, requires_grad=True):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, 4), requires_grad) for _ in range(2))


def blocks(*modules):
    return nn.ModuleDict({"layers": nn.ModuleList(modules)})


def test_gpt2s_matrices_are_split_as_linear_weights_are():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=12, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    groups = split_parameters(model)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names(groups, "Linear in blocks") == [f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts]
    optimizer = Frugal(groups, subspace="rows", density=0.5)
    model(torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    optimizer.step()
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert optimizer.state[weight]["exp_avg"].shape == (4, 32), "half of its 8 inputs"


def test_a_class_of_the_same_name_is_another_class():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3))

    groups = split_parameters(blocks(Conv1D(), nn.Linear(4, 4)))
    assert names(groups, "Linear in blocks") == ["layers.1.weight"]


def test_convolutions_are_split_if_a_rule_says_so_in_blocks():
    model = blocks(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)) for _ in range(3)))
    assert kinds(split_parameters(model))["layers.0.0.weight"] == "state-full"
    rules = [Rule("convolutions", "split", (nn.Conv2d,), tensors="matrices"), *default_rules()]
    optimizer = Frugal(split_parameters(model, rules), density=0.5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [optimizer.state[block[0].weight]["entries"] for block in model["layers"]] == [0, 0, 144]
    with pytest.raises(ValueError, match=r"shape \(4, 4, 3, 3\); columns splits only matrices: .* choose blocks"):
        Frugal(split_parameters(model, rules), subspace="columns")


EXPERTS = [Expert(), nn.Conv2d(4, 4, 3), nn.LayerNorm(4)]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (blocks(*EXPERTS), r"Its blocks hold matrices in Expert \(2\), Conv2d \(1\)\."),
        (
            nn.Sequential(nn.Linear(4, 4), Expert()),
            r"no matrices in blocks, and others in Expert \(2\), Linear \(1\)\.",
        ),
        (blocks(Expert(requires_grad=False), nn.LayerNorm(4)), r"It has no trainable matrix\."),
    ],
)
def test_where_nothing_is_split_the_classes_are_listed_that_hold_matrices(model, says):
    with pytest.raises(ValueError, match=f"nothing to split in .*{says}.*Give rules of your own"):
        split_parameters(model)

"""A small GLUE in the hub's layout, and tiny encoders with tokenizers, all made here."""

import random

import pytest

PAIR = ("sentence1", "sentence2")
COLUMNS = {
    "cola": ("sentence",), "mnli": ("premise", "hypothesis"), "mrpc": PAIR, "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"), "rte": PAIR, "sst2": ("sentence",), "stsb": PAIR, "wnli": PAIR,
}  # fmt: skip
WORDS = ["the", "a", "matrix", "moment", "keeps", "loses", "follows", "good", "bad", "never", "gradient", "state"]
TRAIN, VALIDATION = 26, 11


def rows(task, count, seed):
    """Rows as GLUE has them; a label can be told from the first word of the first sentence."""
    chosen = random.Random(f"{task} {seed}")
    found = []
    for number in range(count):
        texts = [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 20))) for _ in COLUMNS[task]]
        label = round(chosen.random() * 5, 3) if task == "stsb" else number % (3 if task == "mnli" else 2)
        texts[0] = f"{WORDS[int(label)]} {texts[0]}"
        found.append({**dict(zip(COLUMNS[task], texts, strict=True)), "label": label, "idx": number})
    return found


def write_parquet(file, found):
    from pyarrow import Table, parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(Table.from_pylist(found), file)


def write_glue(root, tasks=tuple(COLUMNS)):
    """All splits of some tasks, and the page by which `datasets` finds them."""
    configs = ""
    for task in tasks:
        names = ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",)
        sizes = {"train": TRAIN, **dict.fromkeys(names, VALIDATION)}
        configs += f"- config_name: {task}\n  data_files:\n"
        for seed, (split, size) in enumerate(sizes.items()):
            write_parquet(root / task / f"{split}-00000-of-00001.parquet", rows(task, size, seed))
            configs += f"  - split: {split}\n    path: {task}/{split}-*\n"
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return root


def write_encoder(root, kind="bert", **more):
    """A tiny pretrained encoder without a head: bert, roberta or mpnet, each with the names that it has."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=64, model_input_names=inputs, **names
    ).save_pretrained(root)
    family = {"bert": "Bert", "roberta": "Roberta", "mpnet": "MPNet"}[kind]
    shape = {
        "vocab_size": len(special + WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 66, "pad_token_id": 0, **more,
    }  # fmt: skip
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**shape)
    getattr(transformers, f"{family}Model")(config).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """A mirror of all nine tasks."""
    return write_glue(tmp_path_factory.mktemp("mirror") / "glue")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A BERT of two layers."""
    return write_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture
def finetune_words(glue, tiny_encoder):
    """A function that gives what is typed for a tiny fine-tuning run: task -> words."""

    def make(task="rte"):
        tiny = ["model=encoder", f"model.name={tiny_encoder}", "trainer.sequence_length=48", "trainer.batch_size=8"]
        more = ["trainer.precision=fp32", "trainer.steps=null", "trainer.epochs=2", "trainer.log_every=1"]
        return [f"experiments=glue/{task}", f"data.source={glue}", *tiny, *more, "eval.every=null"]

    return make


@pytest.fixture
def finetune_settings(settings, finetune_words):
    """A function that gives the checked settings of a tiny fine-tuning run: task, overrides -> (settings, choices)."""
    return lambda task="rte", *overrides: settings(*finetune_words(task), *overrides)

"""The model card of a checkpoint: a README.md in the form that the hub reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adafrugal.models import decoder
from adafrugal.settings import checkpoint_names
from adafrugal.settings.optimizer_settings import LoraSettings
from adafrugal.settings.schema import DecoderSettings, EncoderSettings, Settings
from adafrugal.tracking import environment
from adafrugal.training.progress import Progress
from adafrugal.training.tasks.task import Task

NAME = "README.md"
_exists = os.path.exists  # which answers for any text, as Path's own does not
_PACKAGES = ("adafrugal", "torch", "transformers")

_GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

place = "{place}"  # this directory, or the repository at the hub
tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
prompt = tokenizer("The", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=50, do_sample=True)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
_CLASSIFY = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

place = "{place}"  # this directory, or the repository at the hub
tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForSequenceClassification.from_pretrained(place)
print(model(**tokenizer({texts}, return_tensors="pt")).logits)
"""
_WITH_ADAPTERS = """\
import peft
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

place = "{place}"  # this directory
tokenizer = AutoTokenizer.from_pretrained(place)
model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(place))
adapters = peft.LoraConfig(r={rank}, lora_alpha={alpha}, target_modules={targets})
peft.inject_adapter_in_model(adapters, model)
model.load_state_dict(load_file(place + "/model.safetensors"))
print(model(**tokenizer({texts}, return_tensors="pt")).logits)
"""
_TEXT = """\
---
{header}
---

# {title}

{about}

| | |
| --- | --- |
{rows}

## Settings that differ from the defaults

```yaml
{settings}
```

## Load

```python
{snippet}```

{tokens}
If there is no model.safetensors here, the tensors are in shards: `python -m adafrugal.training {place} whole` first.

Where the run was made, `python -m adafrugal.training.evaluate {place}` repeats its evaluation.

## Upload

```bash
hf upload OWNER/NAME {place} --exclude state.pt
```

state.pt has the optimizer's state, to continue the run. This card names no license, since that is yours to choose:
write `license: …` into its header.
"""


class ModelCard:
    """Writes the cards of one run."""

    def __init__(self, settings: Settings, known_as: Mapping[str, Any], task: Task) -> None:
        self._settings, self._known_as, self._task = settings, known_as, task

    def text(self, place: str, progress: Progress, state_bytes: int, evaluated: Mapping[str, Any]) -> str:
        """Return the card of a checkpoint.

        Args:
            place: its directory's name.
            progress: of the run.
            state_bytes: of the optimizer, over all processes.
            evaluated: the numbers of this step's evaluation, empty if there was none.
        """
        rows = self._rows(progress, state_bytes, evaluated)
        shown = {name: _public(value) for name, value in sorted(self._known_as.items())}
        return _TEXT.format(
            header=self._header(), title=f"{self._settings.arm}, step {progress.step:,}", about=self._about(),
            rows="\n".join(f"| {name} | {_plain(value)} |" for name, value in rows),
            settings="\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()),
            snippet=self._snippet(place), tokens=self._tokens(), place=place,
        )  # fmt: skip

    def _header(self) -> str:
        """The YAML that the hub reads."""
        data = self._settings.data
        kind = "text-generation" if self._settings.task.kind == "pretrain" else "text-classification"
        lines = ["library_name: transformers", f"pipeline_tag: {kind}"]
        lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(("adafrugal", self._settings.arm)))]
        if _is_at_the_hub(source := getattr(data, "source", None)):
            lines += ["datasets:", f"- {source}"]
        if _is_at_the_hub(base := self._base()):
            lines.append(f"base_model: {base}")
        return "\n".join(lines)

    def _about(self) -> str:
        settings, model, base = self._settings, self._settings.model, self._base()
        if isinstance(model, EncoderSettings):
            what = f"The encoder {_named(str(base or model.package))}, fine-tuned"
        elif isinstance(model, DecoderSettings):
            what = f"The decoder {_named(str(model.name))}, trained from {'its' if base else 'random'} weights"
        else:
            what = f"A LLaMA decoder, trained from {f'the weights of {_named(base)}' if base else 'random weights'}"
        return f"{what} with the optimizer `{settings.optimizer.kind}` (arm `{settings.arm}`) by adafrugal's train.py."

    def _base(self) -> str | None:
        """The place of the weights with which the run began; None for random ones, and for a package's."""
        model = self._settings.model
        return model.name if isinstance(model, EncoderSettings) else decoder.weights_of(model)

    def _rows(self, progress: Progress, state_bytes: int, evaluated: Mapping[str, Any]) -> list[tuple[str, str]]:
        data, here = self._task.data, environment.describe()
        numbers = {name: value for name, value in evaluated.items() if name.startswith("validation_")}
        parameters = sum(param.numel() for param in self._task.model.parameters())
        source, code = data["source"], here["code"]
        cutter = data.get("tokenizer", {})
        return [
            ("steps", f"{progress.step:,} of {self._settings.trainer.steps:,}"),
            *([("continued from", f"{origin['run']}, step {origin['step']:,}")] if (origin := progress.origin) else []),
            ("tokens", f"{progress.tokens:,}"),
            *((name.replace("_", " "), f"{value:.4f}") for name, value in numbers.items()),
            *([] if numbers else [("evaluation", "none at this step")]),
            ("parameters", f"{parameters:,}"),
            ("optimizer's state", f"{state_bytes / 2**20:.2f} MiB"),
            ("data", " ".join(str(_public(source[key])) for key in ("name", "subset") if source.get(key))),
            ("data's revision", str(source.get("revision") or "none")),
            ("data's fingerprint", data["fingerprint"]),
            *([("tokenizer", f"{cutter['size']:,} ids, fingerprint {cutter['fingerprint']}")] if cutter else []),
            ("code", f"{code['commit'] or 'unknown'}{', changed' if code['changed'] else ''}"),
            ("versions", ", ".join(f"{name} {here['packages'].get(name)}" for name in _PACKAGES)),
        ]  # fmt: skip

    def _snippet(self, place: str) -> str:
        """The program that loads the checkpoint."""
        settings = self._settings
        if settings.task.kind == "pretrain":
            return _GENERATE.format(place=place)
        texts = ", ".join(json.dumps(f"a {field}") for field in settings.data.fields)
        if not isinstance(o := settings.optimizer, LoraSettings):
            return _CLASSIFY.format(place=place, texts=texts)
        more = {"rank": o.rank, "alpha": o.alpha, "targets": list(o.targets)}
        return _WITH_ADAPTERS.format(place=place, texts=texts, **more)

    def _tokens(self) -> str:
        """The run's treatment of a text's ends."""
        if self._settings.task.kind != "pretrain":
            return ""
        config, names = self._task.model.config, json.loads(self._task.files["tokenizer_config.json"])
        end, pad = f"{config.eos_token_id} (`{names['eos_token']}`)", f"{config.pad_token_id} (`{names['pad_token']}`)"
        return (
            f"The run closed each document with the id {end}, began it with none, and padded with {pad}. The tokenizer "
            "adds neither; a text that spells their names is plain text.\n"
        )


def _is_at_the_hub(name: str | None) -> bool:
    """Whether a source or a model is a hub repository, owner/name, and not a path."""
    return bool(name and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not _exists(str(name))


def _public(value: Any) -> Any:
    """A value for everybody to see: of a path on this machine the last part."""
    is_path = isinstance(value, str) and (Path(value).is_absolute() or _exists(value))
    return Path(value).name if is_path else value


def _named(place: str) -> str:
    """The public name of a model's place, of a run's checkpoint with the run's."""
    return _plain(checkpoint_names.name(place) if checkpoint_names.is_checkpoint(place) else _public(place))


def _plain(text: str) -> str:
    """Text for one line or cell of Markdown, in which nothing is HTML or ends a cell."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("|", "&#124;")

"""The card of an adapter: what it was trained on and from, what came of it, and how to open it.

Every figure is read from the run's own ``run.json`` and ``metrics.jsonl``. It takes the place of PEFT's template
(Mitchell et al., arXiv 1810.03993, on what a model card is for).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytoken.training.config import LoraSpec, TrainConfig
from anytoken.training.report.markdown import held_out_table, moments_table


def adapter_card(stage: TrainConfig, facts: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """The card in Markdown, with the front matter that hubs read.

    facts: as from ``facts.run_facts``. entries: the lines of the run's metrics.
    """
    assert stage.lora is not None
    steps = max((entry["step"] for entry in entries), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"---\nbase_model: {stage.init_from}\nlibrary_name: peft\ntags: [anytoken, lora]\n---",
        f"# {Path(stage.output).name}",
        f"An adapter for `{stage.init_from}`: {_settings(stage.lora)}. It is {facts['trained_parameters']:,} of the "
        f"{facts['parameters']:,} weights; the others are the base model's.",
        "## What it was trained on",
        _sets(facts["data"]),
        f"{steps:,} steps of {stage.tokens_per_batch:,} ids, seed {stage.seed}, begun {facts['started']}, commit "
        f"{facts['commit']}, {versions}. The whole recipe is in `stage.yaml`, the data's checksums are in `run.json`.",
        "## What came of it",
        _figures(entries),
        "## How to open it",
        _usage(stage),
        "The licences of the base model and of the data hold for what was made of them.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(spec: LoraSpec) -> str:
    kind = "DoRA" if spec.dora else "rsLoRA" if spec.rslora else "LoRA"
    targets = [name for name in ("attention", "experts", "router") if getattr(spec, name)]
    targets += [f"the vocabulary rows of {name}" for name in spec.new_rows]
    return f"{kind} of rank {spec.r}, alpha {spec.alpha}, on {', '.join(targets)}"


def _sets(data: Sequence[dict[str, Any]]) -> str:
    rows = [f"| `{one['set']}` | {one['records']:,} | `{one['sha256']}` |" for one in data]
    return "\n".join(["| set | records, held-out ones included | sha256 |", "| --- | ---: | --- |", *rows])


def _figures(entries: Sequence[dict[str, Any]]) -> str:
    held_out = [entry for entry in entries if "eval" in entry]
    if not held_out:
        return "\n\n".join(
            ["No samples were held out. Bits per target while training:", moments_table(entries)]
        )
    before = "before training and after" if held_out[0]["step"] == 0 else "first and last"
    return "\n\n".join(
        [
            f"Bits per target on held-out samples, {before} (less is better):",
            held_out_table(held_out[:1] + held_out[1:][-1:]),
        ]
    )


def _usage(stage: TrainConfig) -> str:
    ours = f'import anytoken\n\nmodel = anytoken.load("{stage.init_from}", adapter="{stage.output}")'
    if stage.modalities:
        return (
            f"```python\n{ours}\n```\n\n"
            f"It brings {', '.join(stage.modalities)}, a modality that the base model lacks: `anytoken.load` adds its "
            "rows before PEFT fills them."
        )
    theirs = (
        "import anytoken\nfrom peft import PeftModel\n\n"
        f'lm = PeftModel.from_pretrained(anytoken.load("{stage.init_from}").lm, "{stage.output}")'
    )
    return (
        f"```python\n{ours}\n```\n\nor with PEFT, as on any transformers model:\n\n```python\n{theirs}\n```"
    )

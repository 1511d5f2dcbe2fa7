"""The card of an adapter: its base model, training data, results and usage.

Every figure is read from the run's own ``run.json`` and ``metrics.jsonl``. It replaces PEFT's template (model cards:
Mitchell et al., arXiv 1810.03993).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytoken.training.config import LoraSpec, TrainConfig
from anytoken.training.report.markdown import held_out_table, moments_table


def adapter_card(stage: TrainConfig, facts: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """The card in Markdown, with front matter for model hubs.

    facts: as from ``facts.run_facts``. entries: the lines of the run's metrics.
    """
    assert stage.lora is not None
    steps = max((entry["step"] for entry in entries), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"---\nbase_model: {stage.init_from}\nlibrary_name: peft\ntags: [anytoken, lora]\n---",
        f"# {Path(stage.output).name}",
        f"An adapter for `{stage.init_from}`: {_settings(stage.lora)}. It trains {facts['trained_parameters']:,} of "
        f"{facts['parameters']:,} weights.",
        "## Training data",
        _sets(facts["data"]),
        f"{steps:,} steps of {stage.tokens_per_batch:,} tokens, seed {stage.seed}, started {facts['started']}, commit "
        f"{facts['commit']}, {versions}. The whole recipe is in `stage.yaml`, the data's checksums are in `run.json`.",
        "## Results",
        _figures(entries),
        "## Usage",
        _usage(stage),
        "The licences of the base model and of the data apply to this adapter.",
    ]
    return "\n\n".join(parts) + "\n"


def _settings(spec: LoraSpec) -> str:
    kind = "DoRA" if spec.dora else "rsLoRA" if spec.rslora else "LoRA"
    targets = [name for name in ("attention", "experts", "router") if getattr(spec, name)]
    targets += [f"the vocabulary rows of {name}" for name in spec.new_rows]
    return f"{kind} of rank {spec.r}, alpha {spec.alpha}, on {', '.join(targets)}"


def _sets(data: Sequence[dict[str, Any]]) -> str:
    rows = [f"| `{one['set']}` | {one['records']:,} | `{one['sha256']}` |" for one in data]
    return "\n".join(["| set | records (held-out included) | sha256 |", "| --- | ---: | --- |", *rows])


def _figures(entries: Sequence[dict[str, Any]]) -> str:
    held_out = [entry for entry in entries if "eval" in entry]
    if not held_out:
        return "\n\n".join(["No samples were held out. Training bits per target:", moments_table(entries)])
    before = "before and after training" if held_out[0]["step"] == 0 else "first and last"
    return "\n\n".join(
        [
            f"Bits per target on held-out samples, {before} (lower is better):",
            held_out_table(held_out[:1] + held_out[1:][-1:]),
        ]
    )


def _usage(stage: TrainConfig) -> str:
    ours = f'import anytoken\n\nmodel = anytoken.load("{stage.init_from}", adapter="{stage.output}")'
    if stage.modalities:
        return (
            f"```python\n{ours}\n```\n\n"
            f"It adds {', '.join(stage.modalities)}, which the base model lacks: `anytoken.load` extends the "
            "vocabulary before PEFT loads the weights."
        )
    theirs = (
        "import anytoken\nfrom peft import PeftModel\n\n"
        f'lm = PeftModel.from_pretrained(anytoken.load("{stage.init_from}").lm, "{stage.output}")'
    )
    return (
        f"```python\n{ours}\n```\n\nor with PEFT, as for any transformers model:\n\n```python\n{theirs}\n```"
    )

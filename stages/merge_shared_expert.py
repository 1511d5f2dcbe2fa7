"""Make a checkpoint without a shared expert from one that has it, to train on and to export to stock engines.

    python stages/merge_shared_expert.py mini runs/plain --data data/sets

Stock engines run mixtures of experts without a shared one (Qwen3-MoE). Each routed expert of width W and the shared one
of width S become two experts of width (S + W) / 2 with equal rows in the router: they are always chosen together, and
their sum equals the old output. One thing differs: the weight of a routed expert depended on the token, and is now its
mean, measured on 100 training samples of captioned images and 100 of translated genes in --data. A short training
compensates for that. Sparse upcycling (arXiv 2212.05055) creates experts from a dense layer in a similar way.
"""

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import anytoken
from anytoken import DNA, Image, Text
from anytoken.data.records import open_media
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import AnyTokenMoE
from anytoken.segments import Segment
from anytoken.utils.errors import CheckpointError
from anytoken.utils.json_lines import read_json_lines

SAMPLES = 100  # of each set


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint, or mini.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the new checkpoint to.")],
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")] = Path("data/sets"),
) -> None:
    """Write the checkpoint."""
    loaded = anytoken.load(model)
    prompts: list[list[Segment]] = []
    for file, key in (("emoji/images.jsonl", "image"), ("dna/translate.jsonl", "dna")):
        records = [one for one in read_json_lines(data / file) if one["split"] == "train"]
        for one in records[:: max(1, len(records) // SAMPLES)]:
            media = DNA(one["dna"]) if key == "dna" else open_media(one[key], Image, data / "emoji")
            prompts.append([media, Text(one["text"])])
    ids = [torch.tensor([one for part in prompt for one in loaded.tokenize(part)]) for prompt in prompts]
    loaded.lm = without_shared_expert(loaded.lm, ids)
    loaded.save_pretrained(out)
    typer.echo(f"wrote {out}: {loaded.lm.config.num_experts} experts, none shared")


@torch.no_grad()
def without_shared_expert(lm: AnyTokenForCausalLM, samples: list[Tensor]) -> AnyTokenForCausalLM:
    """A copy with twice as many experts, two chosen per token, none shared; `lm` is unchanged.

    samples: ids [T] of typical sequences, at least one: they tell the mean weight of each expert. CheckpointError for
    a model without a shared expert, with more than one choice per token, expert groups or null experts, or odd widths.
    """
    config = lm.config
    shared, width = config.shared_expert_intermediate_size, config.moe_intermediate_size
    plain = not config.expert_groups and not config.num_null_experts and not config.expert_bias
    if (
        not shared
        or config.num_experts_per_tok != 1
        or config.norm_topk_prob
        or not plain
        or (shared % 2 or width % 2)
    ):
        raise CheckpointError(
            "Only a model with a shared expert of even width and one routed expert per token, without groups, "
            f"null experts or bias, can do without the shared one; received {shared} shared units and "
            f"{config.num_experts_per_tok} experts per token."
        )
    weights = _mean_weights(lm, samples)
    made = copy.deepcopy(config)
    made.num_experts, made.num_experts_per_tok, made.norm_topk_prob = 2 * config.num_experts, 2, True
    made.moe_intermediate_size, made.shared_expert_intermediate_size = (shared + width) // 2, 0
    new = AnyTokenForCausalLM(made).to(lm.device, lm.dtype)
    kept = {name: one for name, one in lm.state_dict().items() if ".mlp." not in name}
    new.load_state_dict(kept, strict=False)
    for before, after, weight in zip(_mixtures(lm), _mixtures(new), weights, strict=True):
        _split(before, after, weight)
    return new.train(lm.training)


def _mean_weights(lm: AnyTokenForCausalLM, samples: list[Tensor]) -> list[Tensor]:
    """Mean weight of each expert over the tokens that chose it, by layer: float32 [E]; 1 / 2 where none did."""
    sums = [torch.zeros(2, lm.config.num_experts, device=lm.device) for _ in _mixtures(lm)]
    hooks = []
    for total, mixture in zip(sums, _mixtures(lm), strict=True):

        def add(
            _: nn.Module, __: object, routed: tuple[Tensor, Tensor, Tensor], total: Tensor = total
        ) -> None:
            weight, choice = routed[1:]
            total[0].index_add_(0, choice[:, 0], weight[:, 0].float())
            total[1].index_add_(0, choice[:, 0], torch.ones_like(weight[:, 0], dtype=torch.float32))

        hooks.append(mixture.gate.register_forward_hook(add))
    try:
        for ids in samples:
            lm.model(input_ids=ids[None].to(lm.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.where(total[1] > 0, total[0] / total[1].clamp(min=1), 0.5) for total in sums]


def _mixtures(lm: AnyTokenForCausalLM) -> list[AnyTokenMoE]:
    return [module for module in lm.modules() if isinstance(module, AnyTokenMoE)]


def _split(before: AnyTokenMoE, after: AnyTokenMoE, weights: Tensor) -> None:
    """Write a layer's experts into those of the new one, two for each."""
    shared = before.shared_expert
    assert shared is not None
    after.gate.weight.copy_(before.gate.weight.repeat_interleave(2, 0))
    for expert, weight in enumerate(weights.tolist()):
        gate, up = before.experts.gate_up_proj[expert].chunk(2)
        down = before.experts.down_proj[expert] * weight
        for half in range(2):
            place = 2 * expert + half
            rows = [_half(shared.gate_proj.weight, gate, half, 0), _half(shared.up_proj.weight, up, half, 0)]
            after.experts.gate_up_proj[place] = torch.cat(rows)
            # Each weighs 1 / 2.
            after.experts.down_proj[place] = 2 * _half(shared.down_proj.weight, down, half, 1)


def _half(shared: Tensor, own: Tensor, half: int, dim: int) -> Tensor:
    return torch.cat([shared.chunk(2, dim)[half], own.chunk(2, dim)[half]], dim)


if __name__ == "__main__":
    typer.run(main)

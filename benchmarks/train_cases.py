"""One side of `train_speed.py`, in a separate process, so that the sides do not share memory.

python benchmarks/train_cases.py '{"case": "ours-torch", ...}'
"""

import sys
from functools import partial
from typing import Any

import torch
from mbridge_config import HFFacts
from mbridge_config.plan.flops import forward_flops
from one_side import Variant, read_settings, run_side
from torch import Tensor
from train_data import GEOMETRIES, Example, make_batches


def main() -> None:
    settings, device = read_settings()
    if settings["case"] == "ours-torch":
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # as if it were not installed
    facts = HFFacts.load(settings["directory"])
    batches = make_batches(
        settings["model"],
        settings["lengths"],
        settings["sequence"],
        settings["samples"],
        settings["warmup"] + settings["steps"],
    )
    make = {"fsdp2": fsdp2_variants, "megatron-te": megatron_variants}.get(settings["case"], ours_variants)
    run_side(settings, device, make, batches, partial(flops, facts, settings["forward_only"]))


def flops(facts: HFFacts, forward_only: bool, batch: list[Example]) -> int:
    """Return the operations of a step that the model needs, without recomputation or padding."""
    work = forward_flops(facts, [len(example.tokens) for example in batch])
    assert work is not None
    return work.total if forward_only else work.training()


def ours_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """Return variants of the engine on each micro-batch size, padded, or packed to each token budget."""
    from engine_side import build_engine, logprob_step, training_step
    from mbridge_train import MicroBatching, Sample, aggregation_weights

    forward_only = settings["forward_only"]
    engine = build_engine(settings, trains=not forward_only)

    def prepare(batch: list[Example]) -> list[Sample]:
        weights = aggregation_weights([example.trained for example in batch], "token-mean")
        return [Sample(tokens=example.tokens, weights=weight) for example, weight in zip(batch, weights, strict=True)]

    if settings["cut_by"] == "token_budget":
        cuts = {f"packed to {budget}": MicroBatching(token_budget=budget) for budget in settings["token_budget"]}
    else:
        sizes = settings["micro_batch_size"]
        cuts = {micro_batch_label(settings, size): MicroBatching(micro_batch_size=size) for size in sizes}
    make = logprob_step if forward_only else training_step
    return [(label, prepare, make(engine, cut)) for label, cut in cuts.items()]


def micro_batch_label(settings: dict[str, Any], size: int) -> str:
    return f"{'' if settings['lengths'] == 'fixed' else 'padded, '}{size} a micro-batch"


def fsdp2_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """Return variants of transformers under FSDP2 on micro-batches of each size, padded if lengths differ."""
    from fsdp2_side import Fsdp2Trainer, collate_tokens, load_model, make_micro_batches
    from transformers import AutoModelForCausalLM

    step: Any
    if settings["forward_only"]:
        model = load_model(AutoModelForCausalLM, settings, device, settings["dtype"]).eval()
        step = partial(hf_logprobs, model, device)
    else:
        model = load_model(AutoModelForCausalLM, settings, device, torch.float32)
        step = Fsdp2Trainer(model, (model.model.layers,), settings, device).step
    return [
        (micro_batch_label(settings, size), partial(make_micro_batches, size, collate_tokens, device), step)
        for size in settings["micro_batch_size"]
    ]


@torch.no_grad()
def hf_logprobs(
    model: Any, device: torch.device, micro_batches: list[tuple[dict[str, Tensor], float]]
) -> tuple[float, None]:
    """Compute fp32 log probabilities of all tokens, copy them to the host like the engine, and return the loss."""
    total = 0.0
    for inputs, weight in micro_batches:
        moved = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
        labels = moved.pop("labels")[:, 1:]
        logits = model(**moved, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").cpu()
        total += weight * float(losses.sum() / (inputs["labels"][:, 1:] != -100).sum())
    return total, None


def megatron_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """Return variants of Megatron-Core in a minimal loop on each micro-batch size."""
    from megatron_side import MegatronTrainer, build_model, make_micro_batches, run

    model = build_model(settings, GEOMETRIES[settings["model"]], device)
    step: Any
    if settings["forward_only"]:

        def step(micro_batches: Any) -> tuple[float, None]:
            return run(model.eval(), micro_batches, device, forward_only=True), None

    else:
        step = MegatronTrainer(model, settings, device).step
    return [
        (micro_batch_label(settings, size), partial(make_micro_batches, size, device), step)
        for size in settings["micro_batch_size"]
    ]


if __name__ == "__main__":
    main()

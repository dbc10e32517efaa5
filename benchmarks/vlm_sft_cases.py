"""One side of `vlm_sft_speed.py`, in a separate process, so that the sides do not share memory.

python benchmarks/vlm_sft_cases.py '{"case": "ours-torch", ...}'
"""

from functools import partial
from typing import Any

import torch
from mbridge_config import HFFacts
from mbridge_config.plan.flops import forward_flops
from one_side import Variant, read_settings, run_side
from torch import Tensor
from vlm_sft_data import Example, make_batches


def main() -> None:
    settings, device = read_settings()
    facts = HFFacts.load(settings["directory"])
    batches = make_batches(settings["model"], settings["samples"], settings["warmup"] + settings["steps"])
    make = fsdp2_variants if settings["case"] == "fsdp2" else ours_variants
    run_side(settings, device, make, batches, partial(training_flops, facts))


def training_flops(facts: HFFacts, batch: list[Example]) -> int:
    """Return the operations of a step that the model needs, without recomputation or padding."""
    images = [grid for example in batch for grid in example.grid_thw.tolist()]
    work = forward_flops(facts, [len(example.tokens) for example in batch], images)
    assert work is not None
    return work.training()


def ours_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """Return variants of the engine on packed micro-batches of each token budget."""
    from engine_side import build_engine, training_step
    from mbridge_model import MropeSettings, VisionInputs, mrope_position_ids
    from mbridge_train import MicroBatching, Sample, aggregation_weights

    engine = build_engine(settings)
    mrope = MropeSettings.from_directory(settings["directory"])

    def prepare(batch: list[Example]) -> list[Sample]:
        weights = aggregation_weights([example.trained for example in batch], "token-mean")
        return [
            Sample(
                tokens=example.tokens,
                weights=weight,
                vision=VisionInputs(pixel_values=example.pixel_values, grid_thw=example.grid_thw),
                position_ids=mrope_position_ids(example.tokens, example.grid_thw, mrope),
            )
            for example, weight in zip(batch, weights, strict=True)
        ]

    return [
        (f"packed to {budget}", prepare, training_step(engine, MicroBatching(token_budget=budget)))
        for budget in settings["token_budget"]
    ]


def fsdp2_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """Return variants of transformers under FSDP2 on padded micro-batches of each size."""
    from fsdp2_side import Fsdp2Trainer, load_model, make_micro_batches
    from transformers import AutoModelForImageTextToText

    model = load_model(AutoModelForImageTextToText, settings, device, torch.float32)
    blocks = (model.model.visual.blocks, model.model.language_model.layers)
    trainer = Fsdp2Trainer(model, blocks, settings, device)
    return [
        (
            f"padded, {size} a micro-batch",
            partial(make_micro_batches, size, partial(collate, model), device),
            trainer.step,
        )
        for size in settings["micro_batch_size"]
    ]


def collate(model: Any, part: list[Example]) -> dict[str, Tensor]:
    """Return the model inputs that a processor and a collator would make from samples."""
    from fsdp2_side import collate_tokens

    inputs = collate_tokens(part)
    tokens = inputs["input_ids"]
    grid_thw = torch.cat([example.grid_thw for example in part])
    positions = model.model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        image_grid_thw=grid_thw,
        attention_mask=inputs.get("attention_mask", torch.ones_like(tokens)),
    )[0]
    pixels = torch.cat([example.pixel_values for example in part])
    return inputs | {"position_ids": positions, "pixel_values": pixels, "image_grid_thw": grid_thw}


if __name__ == "__main__":
    main()

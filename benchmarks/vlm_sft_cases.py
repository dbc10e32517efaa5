"""One side of `vlm_sft_speed.py`, in a process of its own, so that its memory is its own.

    python benchmarks/vlm_sft_cases.py '{"case": "ours-torch", ...}'

Appends a line of JSON to the file `results` for each variant (token budget or micro-batch size), as soon as it is
known. Variants go from small to large; after one that is out of memory there is no other.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vlm_sft_data import Example, Work, make_batches

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP_GRAD = 1e-5, 0.01, (0.9, 0.95), 1e-8, 1.0
STARTED = time.perf_counter()
# One optimizer step over what `prepare` made of a global batch: its loss and gradient norm.
Prepare = Callable[[list[Example]], Any]
Step = Callable[[Any], tuple[float, float]]
Variant = tuple[str, Prepare, Step]


def main() -> None:
    settings = json.loads(sys.argv[1])
    settings["dtype"] = getattr(torch, settings["dtype"])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ceiling = matmul_ceiling(device, settings["dtype"])
    say(f"matmul ceiling {ceiling / 1e12:.0f} TFLOP/s")
    batches = make_batches(settings["model"], settings["samples"], settings["warmup"] + settings["steps"])
    work = Work(settings["model"])
    make = fsdp2_variants if settings["case"] == "fsdp2" else ours_variants
    label = "every variant"
    try:
        variants = make(settings, device)
        say("model and optimizer built")
        for label, prepare, step in variants:
            result = measure(prepare, step, batches, settings["warmup"], device)
            result["flops"] = [work.flops(batch) for batch in batches[settings["warmup"] :]]
            record(settings, {"variant": label, "ceiling": ceiling, "parameters": work.parameters} | result)
    except torch.OutOfMemoryError as error:
        record(settings, {"variant": label, "error": f"out of memory: {str(error).splitlines()[0]}"})
    except Exception as error:  # the other sides shall still run
        if settings["strict"]:
            raise
        record(settings, {"variant": label, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})


def record(settings: dict[str, Any], result: dict[str, Any]) -> None:
    kept = {name: settings[name] for name in ("case", "recompute", "keep_gathered")}
    with Path(settings["results"]).open("a") as stream:
        stream.write(json.dumps(kept | result) + "\n")
    say(result.get("error") or f"{result['variant']}: {[round(value, 3) for value in result['seconds']]} s a step")


def say(text: str) -> None:
    print(f"  [{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(13):  # the first are warm-up, and cannot be the best
        synchronize(device)
        begin = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def measure(
    prepare: Prepare, step: Step, batches: list[list[Example]], warmup: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of each step after `warmup` ones, losses and gradient norms of all, and the peak of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, grad_norms = [], [], []
    for batch in batches:
        prepared = prepare(batch)
        synchronize(device)
        begin = time.perf_counter()
        loss, grad_norm = step(prepared)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss)
        grad_norms.append(grad_norm)
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "CPU",
        "seconds": seconds[warmup:],
        "tokens": [sum(len(example.tokens) for example in batch) for batch in batches[warmup:]],
        "losses": losses,
        "grad_norms": grad_norms,
        "peak_allocated": torch.cuda.max_memory_allocated() if is_gpu else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if is_gpu else None,
    }


def ours_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """The engine, on packed micro-batches of each token budget."""
    from mbridge_model import MropeSettings, VisionInputs, load, mrope_position_ids
    from mbridge_train import Engine, MicroBatching, OptimizerSettings, Sample, Schedule, aggregation_weights, sft_loss

    overrides: dict[str, Any] = {"calculate_per_token_loss": True}
    if settings["recompute"]:
        overrides |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model, handle = load(
        settings["directory"],
        None,
        overrides,
        settings["case"].removeprefix("ours-"),
        dtype=settings["dtype"],
        weights=settings["same_weights"],
    )
    budgets = settings["token_budget"]
    engine = Engine(
        model,
        handle,
        micro_batching=MicroBatching(token_budget=budgets[0]),
        optimizer=OptimizerSettings(
            schedule=Schedule(max_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
            betas=BETAS,
            epsilon=EPSILON,
            clip_grad=CLIP_GRAD,
        ),
    )
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

    def step(budget: int, batch: list[Sample]) -> tuple[float, float]:
        engine.micro_batching = MicroBatching(token_budget=budget)
        loss = engine.forward_backward(batch, sft_loss)["loss"]
        return loss, engine.step().grad_norm

    return [(f"packed to {budget}", prepare, partial(step, budget)) for budget in budgets]


def fsdp2_variants(settings: dict[str, Any], device: torch.device) -> list[Variant]:
    """transformers under FSDP2, on padded micro-batches of each size."""
    import transformers
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    auto = transformers.AutoModelForImageTextToText
    options = {"dtype": torch.float32, "attn_implementation": settings["attention"]}
    if settings["same_weights"]:
        model = auto.from_pretrained(settings["directory"], **options).to(device)
    else:
        with device:
            torch.manual_seed(0)
            model = auto.from_config(transformers.AutoConfig.from_pretrained(settings["directory"]), **options)
    model.config.use_cache = False
    model.train()
    # Master weights are fp32; compute is in `dtype`, gradients are reduced and added up in fp32.
    sharding: dict[str, Any] = {
        "mesh": torch.distributed.device_mesh.init_device_mesh(device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=settings["dtype"], reduce_dtype=torch.float32),
        "reshard_after_forward": not settings["keep_gathered"],
    }
    for blocks in (model.model.visual.blocks, model.model.language_model.layers):
        for number, block in enumerate(blocks):
            # Inside the sharded module, as torch advises: transformers' own switch would gather weights once more.
            blocks[number] = checkpoint_wrapper(block, preserve_rng_state=False) if settings["recompute"] else block
            fully_shard(blocks[number], **sharding)
    fully_shard(model, **sharding)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )

    def prepare(size: int, batch: list[Example]) -> list[tuple[dict[str, Tensor], float]]:
        """Inputs and weights of micro-batches, in pinned memory as a DataLoader's workers leave them.

        Samples of similar length share a micro-batch, as with the Trainer's `group_by_length`.
        """
        ordered = sorted(batch, key=lambda example: -len(example.tokens))
        parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        trained = sum(int(example.trained.sum()) for example in batch)
        return [
            (
                {name: pin(value, device) for name, value in collate(part, model).items()},
                sum(int(example.trained.sum()) for example in part) / trained,
            )
            for part in parts
        ]

    def step(micro_batches: list[tuple[dict[str, Tensor], float]]) -> tuple[float, float]:
        total = torch.zeros((), device=device)
        for number, (inputs, weight) in enumerate(micro_batches):
            # Gradients are added up locally and reduced once, in the last backward pass.
            model.set_requires_gradient_sync(not settings["keep_gathered"] or number == len(micro_batches) - 1)
            moved = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
            loss = model(**moved, use_cache=False).loss * weight
            loss.backward()
            total += loss.detach()
        grad_norm: Any = torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), grad_norm.full_tensor().item()

    return [(f"padded, {size} a micro-batch", partial(prepare, size), step) for size in settings["micro_batch_size"]]


def collate(part: list[Example], model: Any) -> dict[str, Tensor]:
    """What a processor and a collator make of some samples; the mask is left out where nothing is padded."""
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([example.tokens for example in part], batch_first=True)
    labels = pad(
        [example.tokens.where(example.trained, -100) for example in part], batch_first=True, padding_value=-100
    )
    mask = pad([torch.ones_like(example.tokens) for example in part], batch_first=True)
    grid_thw = torch.cat([example.grid_thw for example in part])
    positions = model.model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        image_grid_thw=grid_thw,
        attention_mask=mask,
    )[0]
    inputs = {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": positions,
        "pixel_values": torch.cat([example.pixel_values for example in part]),
        "image_grid_thw": grid_thw,
    }
    return inputs if bool(mask.all()) else inputs | {"attention_mask": mask}


def pin(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory() if device.type == "cuda" else value


if __name__ == "__main__":
    main()

"""The process of one side of a benchmark: time variants from small to large.

Each result is appended to the file `results` at once, as a line of JSON. The process stops after the first variant that
runs out of memory.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP_GRAD = 1e-5, 0.01, (0.9, 0.95), 1e-8, 1.0
STARTED = time.perf_counter()


class Example(Protocol):
    """A sequence: int64 [length] token ids, and bool [length], True for trained tokens."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def trained(self) -> Tensor: ...


# One step over a prepared global batch; returns the loss and the gradient norm, or None for a forward pass alone.
Prepare = Callable[[list[Any]], Any]
Step = Callable[[Any], tuple[float, float | None]]
Variant = tuple[str, Prepare, Step]


def read_settings() -> tuple[dict[str, Any], torch.device]:
    """Read the settings that `side_by_side` passed on the command line, and the device."""
    settings = json.loads(sys.argv[1])
    settings["dtype"] = getattr(torch, settings["dtype"])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return settings, device


def run_side(
    settings: dict[str, Any],
    device: torch.device,
    make_variants: Callable[[dict[str, Any], torch.device], Sequence[Variant]],
    batches: Sequence[list[Any]],
    flops: Callable[[list[Any]], int],
) -> None:
    """Measure all variants over the same global batches of examples, each of `flops` operations."""
    ceiling = matmul_ceiling(device, settings["dtype"])
    say(f"matmul ceiling {ceiling / 1e12:.3g} TFLOP/s")
    label = "every variant"
    try:
        variants = make_variants(settings, device)
        say("model and optimizer built")
        for number, (label, prepare, step) in enumerate(variants):
            result = measure(prepare, step, batches, settings["warmup"], device)
            result["flops"] = [flops(batch) for batch in batches[settings["warmup"] :]]
            # Later variants continue from the weights that earlier ones trained.
            record(settings, {"variant": label, "ceiling": ceiling, "is_first": number == 0} | result)
    except torch.OutOfMemoryError as error:
        record(settings, {"variant": label, "error": f"out of memory: {str(error).splitlines()[0]}"})
    except Exception as error:  # so that the other sides still run
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
    """Return operations per second of a large square matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(13):  # the first are warm-up, and never the best
        synchronize(device)
        begin = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def measure(
    prepare: Prepare, step: Step, batches: Sequence[list[Example]], warmup: int, device: torch.device
) -> dict[str, Any]:
    """Return seconds of each step after `warmup` steps, losses and gradient norms of all, and peak memory."""
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

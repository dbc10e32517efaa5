"""Speed of offloading weights and optimizer state and of copying weights into another model, and of plain copies.

    ./uvw run python benchmarks/memory_moves.py --model 1.5b --what offload stream
    ./uvw run python benchmarks/memory_moves.py --model 7b --what stream
    ./uvw run python benchmarks/memory_moves.py --model tiny            # on a CPU, as in the test

One process and one GPU; random bf16 weights with the geometry of Qwen2.5. "offload" moves weights, fp32 master weights
and moments to host memory and back; "plain" is as many bytes in copies between one pinned and one device buffer of up
to 1 GiB. "stream" copies the exported weights into another model's tensors; "plain" is as many bytes in copies between
two device buffers. Figures are medians of the rounds; the first round, which allocates the pinned memory, is shown
separately. Extra memory is the peak of torch's allocator above the memory allocated before. The 7B model has gradient
buffers but no optimizer, because the optimizer's state does not fit on one GPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_data import GEOMETRIES, write_config

PLAIN_BYTES = 1 << 30


def make_engine(name: str, directory: Path) -> Any:
    """Build an engine whose optimizer has taken a step, so that moments exist; the 7B model has gradient buffers only.

    The random weights are in no file, but the export reads their names from an index in `directory`.
    """
    from mbridge_model import load
    from mbridge_train import Engine, MicroBatching, OptimizerSettings, Sample, Schedule, aggregation_weights, sft_loss
    from mbridge_train.optim.optimizer import wrap_data_parallel
    from transformers import Qwen2Config, Qwen2ForCausalLM

    write_config(name, directory)
    config = Qwen2Config(**GEOMETRIES[name])
    with torch.device("meta"):
        names = [key for key, _ in Qwen2ForCausalLM(config).named_parameters()]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    model, handle = load(directory, None, {"calculate_per_token_loss": True}, dtype=torch.bfloat16, weights=False)
    settings = OptimizerSettings(schedule=Schedule(max_lr=1e-6))
    micro_batching = MicroBatching(micro_batch_size=1)
    if name == "7b":
        return Engine(list(wrap_data_parallel(model, settings)), handle, micro_batching=micro_batching)
    engine = Engine(model, handle, micro_batching=micro_batching, optimizer=settings)
    (weights,) = aggregation_weights([torch.arange(8) > 0], "token-mean")
    engine.forward_backward([Sample(tokens=torch.arange(8), weights=weights)], sft_loss)
    engine.step()
    return engine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def extra_memory(action: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of the allocator during `action` above the memory allocated before; 0 on a CPU."""
    if device.type != "cuda":
        action()
        return 0
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


def copy_repeatedly(target: Tensor, source: Tensor, total: int) -> None:
    while total > 0:
        size = min(total, len(source))
        target[:size].copy_(source[:size], non_blocking=True)
        total -= size


def plain_seconds(size: int, rounds: int, device: torch.device) -> float:
    """Return the seconds to copy `size` bytes between two buffers of the device."""
    source, target = (torch.empty(min(size, PLAIN_BYTES), dtype=torch.uint8, device=device) for _ in range(2))
    runs = [seconds_of(lambda: copy_repeatedly(target, source, size), device) for _ in range(rounds + 1)]
    return statistics.median(runs[1:])


def figures(size: int, runs: list[float], plain: float) -> dict[str, float]:
    median = statistics.median(runs[1:])
    rate = {"seconds": median, "first_seconds": runs[0], "gigabytes_per_second": size / median / 1e9}
    return rate | {"plain_gigabytes_per_second": size / plain / 1e9, "share_of_plain": plain / median}


def measure_offload(engine: Any, rounds: int) -> dict[str, Any]:
    device = engine.device
    parts = ("weights", "optimizer") if engine.optimizer is not None else ("weights",)
    before = allocated(device)
    out, back, within = [], [], 0
    for _ in range(rounds + 1):
        out.append(seconds_of(lambda: engine.offload(*parts), device))
        within = allocated(device)
        back.append(seconds_of(engine.onload, device))
        engine.memory.require(*parts)
    size = engine_bytes(engine)
    host = torch.empty(min(size, PLAIN_BYTES), dtype=torch.uint8, pin_memory=device.type == "cuda")
    own = torch.empty(len(host), dtype=torch.uint8, device=device)
    copies = ((host, own), (own, host))
    plain = [[seconds_of(partial(copy_repeatedly, *pair, size), device) for pair in copies] for _ in range(rounds + 1)]
    return {
        "bytes": size,
        "allocated_before": before,
        "allocated_while_offloaded": within,
        "offload": figures(size, out, statistics.median(run[0] for run in plain[1:])),
        "onload": figures(size, back, statistics.median(run[1] for run in plain[1:])),
    }


def engine_bytes(engine: Any) -> int:
    """Return the bytes of weights, master weights and moments, counting each storage once."""
    tensors = [parameter for chunk in engine.model for parameter in chunk.parameters()]
    tensors += [] if engine.optimizer is None else engine.optimizer.tensors()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def make_targets(shapes: Iterable[tuple[str, torch.Size]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes}


def measure_stream(engine: Any, rounds: int) -> dict[str, Any]:
    from mbridge_train.memory.copying import copy_tensors

    device = engine.device
    shapes, size = [], 0
    for name, tensor in engine.export_weights():
        shapes.append((name, tensor.shape))
        size += tensor.nbytes
    targets = make_targets(shapes, device)

    def copy_weights() -> None:
        copy_tensors((targets[name], tensor) for name, tensor in engine.export_weights())

    runs = [seconds_of(copy_weights, device) for _ in range(rounds + 1)]
    extra = extra_memory(copy_weights, device)
    weights = figures(size, runs, plain_seconds(size, rounds, device)) | {"extra_bytes": extra}
    return {"bytes": size, "weights": weights}


def show(report: dict[str, Any]) -> None:
    print(f"{report['model']} on {report['device']}, torch {torch.__version__}, {report['rounds']} rounds")
    for kind in ("offload", "stream"):
        for name, row in report.get(kind, {}).items():
            if isinstance(row, dict):
                extra = f", {row['extra_bytes'] / 2**30:.2f} GiB extra" if "extra_bytes" in row else ""
                print(
                    f"{name:12} {row['seconds']:8.3f} s (first {row['first_seconds']:.3f})"
                    f" {row['gigabytes_per_second']:8.1f} GB/s, {row['share_of_plain']:.0%} of plain"
                    f" {row['plain_gigabytes_per_second']:.1f}{extra}"
                )
    if "offload" in report:
        before, within = (report["offload"][f"allocated_{when}"] / 2**30 for when in ("before", "while_offloaded"))
        print(f"allocated: {before:.2f} GiB, while offloaded {within:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="1.5b")
    parser.add_argument("--what", nargs="+", choices=("offload", "stream"), default=["offload", "stream"])
    parser.add_argument("--rounds", type=int, default=5, help="after a first one")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = measure(arguments, make_engine(arguments.model, Path(directory)))
    show(report)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def measure(arguments: argparse.Namespace, engine: Any) -> dict[str, Any]:
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"model": arguments.model, "device": name, "rounds": arguments.rounds}
    if "stream" in arguments.what:
        report["stream"] = measure_stream(engine, arguments.rounds)
    if "offload" in arguments.what:
        report["offload"] = measure_offload(engine, arguments.rounds)
    return report


if __name__ == "__main__":
    main()

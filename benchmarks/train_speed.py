"""Training speed of language models on one GPU: transformers + FSDP2, plain Megatron-Core, and mbridge's engine.

    ./uvw run python benchmarks/train_speed.py --output figures                # Qwen2.5-1.5B, sequences of 4096
    ./uvw run python benchmarks/train_speed.py --lengths mixed                 # 64 to 4096 tokens, packed or padded
    ./uvw run python benchmarks/train_speed.py --lengths grpo --samples 64     # groups of eight sampled answers
    ./uvw run python benchmarks/train_speed.py --forward-only                  # log probabilities
    ./uvw run python benchmarks/train_speed.py --model tiny --device cpu       # on any laptop

The sides run one after the other in separate processes, on the same weights and the same global batches of random
tokens. The loss is the mean over all trained tokens of a global batch; the optimizer is AdamW on fp32 master weights
with clipping:

  fsdp2                transformers and torch's `fully_shard`, SDPA, without cuDNN if lengths vary, fused AdamW
  megatron-te          Megatron-Core with Transformer Engine's layers, DDP and distributed optimizer in a minimal loop
  ours-te              the engine on Transformer Engine's layers
  ours-torch           the engine on plain torch layers, in a process that cannot import Transformer Engine

A step is everything from samples in memory to updated weights. Times are medians (minimum, maximum) over the steps
after warm-up; padding does not count as tokens. TFLOP/s count the operations that the model needs
(`mbridge_config.plan.flops`), and are compared with a matrix product of 8192 x 8192 in the same process. If the first
losses of the sides differ, the command fails with a message. With --lengths mixed or grpo, the engine packs to each
--token-budget and pads to each --micro-batch-size; fsdp2 pads, with samples sorted by length. The minimal loop of
megatron-te does neither and is left out. --forward-only measures log probabilities of all tokens without gradients;
transformers then runs without sharding, with weights in the dtype of the computation.

--output DIRECTORY writes figures.json, table.md and plot.svg.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from side_by_side import run_ladder, run_process, speedups, table, write_weights
from train_data import GEOMETRIES, LENGTHS, write_config
from transformers import AutoModelForCausalLM

CASES = ("fsdp2", "megatron-te", "ours-te", "ours-torch")
# Largest relative difference of the first losses: rounding of the dtype, averaged over thousands of tokens.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}


def why_skipped(case: str, arguments: argparse.Namespace) -> str | None:
    """Return why a side cannot run here, or None."""
    if case.endswith("-te"):
        if arguments.device == "cpu":
            return "Transformer Engine needs a GPU"
        if find_spec("transformer_engine") is None:
            return "Transformer Engine is not installed"
    if case == "megatron-te" and arguments.lengths != "fixed":
        return "the minimal loop takes sequences of one length"
    return None


def run_case(case: str, arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return the results of all variants of one side, including failures."""
    if reason := why_skipped(case, arguments):
        print(f"{case} is skipped: {reason}", flush=True)
        return []
    settings = {name: value for name, value in vars(arguments).items() if name not in ("cases", "output")}
    settings |= {"case": case, "directory": str(directory), "same_weights": True}
    packs = case.startswith("ours") and arguments.lengths != "fixed"
    # Weights stay gathered between micro-batches if memory allows, which is faster.
    keeps = [True, False] if case == "fsdp2" and not arguments.forward_only else [None]

    results = []
    for cut_by in ("token_budget", "micro_batch_size") if packs else ("micro_batch_size",):

        def run(choice: dict[str, Any], cut_by: str = cut_by) -> list[dict[str, Any]]:
            return run_process("train_cases.py", settings | choice | {"cut_by": cut_by})

        sizes = getattr(arguments, cut_by)
        results += run_ladder(run, cut_by, sizes, [{"keep_gathered": keep} for keep in keeps])
    return results


def first_losses(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the loss of the first step from the common weights, by side and variant."""
    firsts = [result for result in results if result.get("is_first")]
    return {f"{result['case']}, {result['variant']}": result["losses"][0] for result in firsts}


def disagreement(losses: dict[str, float]) -> float:
    """Return the largest relative difference."""
    return max(losses.values(), default=1.0) / min(losses.values(), default=1.0) - 1


def draw(results: list[dict[str, Any]], title: str, file: Path) -> None:
    """Plot TFLOP/s of every variant, with minimum and maximum, and of the matrix product."""
    from matplotlib.figure import Figure

    done = [result for result in results if "summary" in result][::-1]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(done)), layout="constrained")
    axes = figure.add_subplot()
    colors = dict(zip(CASES, ("#8a8f98", "#e4853a", "#2f7ed8", "#3aa76d"), strict=True))
    for row, result in enumerate(done):
        median, least, most = result["summary"]["tflops_per_second"]
        axes.barh(row, median, color=colors[result["case"]], xerr=[[median - least], [most - median]], capsize=2)
    axes.set_yticks(range(len(done)), [f"{result['case']}, {result['variant']}" for result in done])
    axes.axvline(max(result["ceiling"] for result in done) / 1e12, color="#555555", linestyle="--")
    axes.set_xlabel("TFLOP/s that the model needs; dashed: a matrix product's")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="1.5b")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--lengths", choices=LENGTHS, default="fixed")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence, of the longest if they vary")
    parser.add_argument("--samples", type=int, default=8, help="in a global batch")
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[1, 2, 4], help="sequences")
    parser.add_argument("--token-budget", type=int, nargs="+", default=[4096, 8192, 16384], help="of a packed one")
    parser.add_argument("--steps", type=int, default=5, help="measured ones, of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--forward-only", action="store_true", help="log probabilities instead of training")
    parser.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2"), default="sdpa", help="of fsdp2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--strict", action="store_true", help="end a side with the trace of its error")
    parser.add_argument("--output", type=Path, help="directory for figures, table and plot")
    arguments = parser.parse_args()
    arguments.token_budget.sort()
    arguments.micro_batch_size.sort()
    if not torch.cuda.is_available():
        arguments.device = "cpu"

    begin = time.perf_counter()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_config(arguments.model, directory)
        write_weights(AutoModelForCausalLM, directory, getattr(torch, arguments.dtype))
        for case in arguments.cases:
            results += run_case(case, arguments, directory)
    losses = first_losses(results)
    difference = disagreement(losses)
    device = ", ".join({result["device"] for result in results if "device" in result}) or "no result"
    kind = "log probabilities" if arguments.forward_only else "training"
    title = f"Qwen2.5 {arguments.model}, {arguments.lengths} lengths to {arguments.sequence}, {kind}, {device}"
    print(f"\n{title}, torch {torch.__version__}, {arguments.dtype}\n{table(results)}", end="")
    ratios = {other: speedups(results, CASES, other) for other in CASES[:2]}
    for other, found in ratios.items():
        for case, ratio in found.items():
            print(f"{case}: {ratio:.2f} times the tokens/s of {other}, each side's best variant")
    print(f"first losses differ by {difference:.1e} of themselves; {time.perf_counter() - begin:.0f} s in all")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        report = {
            "torch": torch.__version__,
            "command": " ".join(["benchmarks/train_speed.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "results": results,
            "first_losses": losses,
            "speedups": ratios,
        }
        (arguments.output / "figures.json").write_text(json.dumps(report, indent=1))
        (arguments.output / "table.md").write_text(table(results))
        if any("summary" in result for result in results):
            draw(results, title, arguments.output / "plot.svg")
    if difference > TOLERANCE[arguments.dtype]:
        print(f"the sides do not compute the same: first losses {losses}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

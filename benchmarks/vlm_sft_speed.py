"""Fine-tuning speed of vision-language models on one GPU, beside transformers under FSDP2 on the same data.

    ./uvw run python benchmarks/vlm_sft_speed.py --model 2.5-3b
    ./uvw run python benchmarks/vlm_sft_speed.py --model 3-4b --output 3-4b.json
    ./uvw run python benchmarks/vlm_sft_speed.py --model tiny --dtype float32 --same-weights    # on any laptop

Models have the real geometry and random weights, samples 1 to 3 images with sides of 224 to 896 pixels and 30 to 400
tokens of text; the loss is the mean over all answer tokens of the global batch, the optimizer AdamW on fp32 master
weights with clipping. Sides:

  ours-torch, ours-te  the engine on plain torch layers or Transformer Engine's, packed to each --token-budget
  fsdp2                transformers and torch's `fully_shard`, SDPA, fused AdamW, samples sorted by length and padded to
                       the longest of each micro-batch, micro-batches collated beforehand in pinned memory

Each runs in a process of its own, one after the other, over the same global batches. A step is everything from samples
in memory to updated weights; decoding of images is no part of it. Times are medians (least, most) over the steps after
warm-up, tokens are real ones, without padding. TFLOP/s count what the model needs (`vlm_sft_data.Work`), as a share of
a matrix product's of 8192 x 8192 in the same process. Without --same-weights the sides draw their own random weights,
so that the losses agree only in size.

Memory a parameter: ours 18 bytes (weight 2, gradient 4, master weight 4, moments 8), fsdp2 16 and copies in bf16 of
the layers in use. Where activations do not fit besides, a side is run again with activations recomputed
(--recompute auto), and what still fits nowhere is said to be out of memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from vlm_sft_data import GEOMETRIES, write_config

CASES = ("ours-torch", "ours-te", "fsdp2")


def attempts(case: str, recompute: str) -> list[list[dict[str, bool]]]:
    """Settings to run, fastest and largest first; of an inner list each takes the variants that fit none before it."""
    kept = [True, False] if case == "fsdp2" else [False]
    off, on = ([{"recompute": value, "keep_gathered": keep} for keep in kept] for value in (False, True))
    return {"off": [off], "on": [on], "both": [off, on], "auto": [off + on]}[recompute]


def run_case(case: str, arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Results of all variants of one side, failures among them."""
    sizes_name = "micro_batch_size" if case == "fsdp2" else "token_budget"
    found: list[dict[str, Any]] = []
    for ladder in attempts(case, arguments.recompute):
        sizes = list(getattr(arguments, sizes_name))
        for choice in ladder:
            lines = run_process(case, arguments, directory, choice | {sizes_name: sizes})
            found += lines
            sizes = sizes[sum("error" not in line for line in lines) :]
            if not any("out of memory" in line.get("error", "") for line in lines):
                break
    return found


def run_process(
    case: str, arguments: argparse.Namespace, directory: Path, choice: dict[str, Any]
) -> list[dict[str, Any]]:
    """Results of one process, which ends at its first failure."""
    results = directory / "results.jsonl"
    results.unlink(missing_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("cases", "output")}
    settings |= choice | {"case": case, "directory": str(directory), "results": str(results)}
    print(f"{case} {describe(settings)}", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("vlm_sft_cases.py")), json.dumps(settings)]
    # Micro-batches differ in length, which cuts the memory of a GPU to pieces otherwise.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    code = subprocess.run(command, env=environment, check=False).returncode
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if code:
        lines.append(settings | {"variant": "", "error": f"the process ended with status {code}"})
    return lines


def describe(result: dict[str, Any]) -> str:
    """How a side was run, in words."""
    words = ["recomputed"] if result["recompute"] else []
    if result["case"] == "fsdp2":
        words.append("weights kept gathered" if result["keep_gathered"] else "weights gathered twice")
    return ", ".join(words)


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Median, least and most of the rates over the steps."""

    def spread(amounts: list[float], unit: float) -> tuple[float, float, float]:
        rates = [amount / unit / second for amount, second in zip(amounts, result["seconds"], strict=True)]
        return statistics.median(rates), min(rates), max(rates)

    tokens, tera = spread(result["tokens"], 1.0), spread(result["flops"], 1e12)
    return {
        "tokens_per_second": tokens,
        "tflops_per_second": tera,
        "share_of_matmul": tera[0] * 1e12 / result["ceiling"],
        "peak_gib": None if result["peak_allocated"] is None else result["peak_allocated"] / 2**30,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    header = ("side", "variant", "tokens/s (least, most)", "TFLOP/s", "of matmul", "peak GiB", "first loss", "last")
    rows = [header]
    for result in results:
        variant = ", ".join(filter(None, (result["variant"], describe(result))))
        if "error" in result:
            rows.append((result["case"], variant, result["error"], "", "", "", "", ""))
            continue
        summary = result["summary"]
        median, least, most = summary["tokens_per_second"]
        peak = "-" if summary["peak_gib"] is None else f"{summary['peak_gib']:.1f}"
        rows.append(
            (
                result["case"],
                variant,
                f"{median:,.0f} ({least:,.0f}, {most:,.0f})",
                f"{summary['tflops_per_second'][0]:.3g}",
                f"{summary['share_of_matmul']:.1%}",
                peak,
                f"{result['losses'][0]:.5f}",
                f"{result['losses'][-1]:.5f}",
            )
        )
    for row in rows:
        print("| " + " | ".join(row) + " |")
        if row is header:
            print("|" + "---|" * len(header))


def best(results: list[dict[str, Any]], case: str) -> dict[str, Any] | None:
    done = [result for result in results if result["case"] == case and "summary" in result]
    return max(done, key=lambda result: float(result["summary"]["tokens_per_second"][0]), default=None)


def compare(results: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second of our best variants over the best of fsdp2."""
    other = best(results, "fsdp2")
    mine = {case: best(results, case) for case in CASES[:2]}
    return {
        case: result["summary"]["tokens_per_second"][0] / other["summary"]["tokens_per_second"][0]
        for case, result in mine.items()
        if result is not None and other is not None
    }


def write_weights(directory: Path, dtype: torch.dtype) -> None:
    """Random weights that all sides load, on the GPU if there is one: 8 GB of disk for the largest model."""
    import transformers

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.save_pretrained(directory)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--token-budget", type=int, nargs="+", default=[4096, 8192], help="tokens a micro-batch, ours")
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[1, 2, 4], help="samples, fsdp2")
    parser.add_argument("--samples", type=int, default=24, help="in a global batch")
    parser.add_argument("--steps", type=int, default=3, help="measured ones, of each variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--recompute", choices=("auto", "off", "on", "both"), default="auto", help="of activations")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2"), default="sdpa", help="of fsdp2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--same-weights", action="store_true", help="all sides load the same weights from disk")
    parser.add_argument("--strict", action="store_true", help="end a side with the trace of its error")
    parser.add_argument("--output", type=Path, help="file for the figures in JSON")
    arguments = parser.parse_args()
    arguments.token_budget.sort()
    arguments.micro_batch_size.sort()

    begin = time.perf_counter()
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "arguments": {name: str(value) if name == "output" else value for name, value in vars(arguments).items()},
        "results": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_config(arguments.model, directory)
        if arguments.same_weights:
            write_weights(directory, getattr(torch, arguments.dtype))
        for case in arguments.cases:
            for result in run_case(case, arguments, directory):
                if "error" not in result:
                    result["summary"] = summarize(result)
                report["results"].append(result)
            report["speedup"] = compare(report["results"])
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(report, indent=1))
    devices = {result["device"] for result in report["results"] if "device" in result}
    print(f"\n{', '.join(devices) or 'no result'}, torch {report['torch']}, {arguments.model}, {arguments.dtype}")
    print_table(report["results"])
    for case, ratio in report["speedup"].items():
        print(f"{case}: {ratio:.2f} times the tokens/s of fsdp2, each side's best variant")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()

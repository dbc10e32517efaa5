"""Fine-tuning speed of vision-language models on one GPU, compared with transformers under FSDP2 on the same data.

    ./uvw run python benchmarks/vlm_sft_speed.py --model 2.5-3b
    ./uvw run python benchmarks/vlm_sft_speed.py --model 3-4b --output 3-4b.json
    ./uvw run python benchmarks/vlm_sft_speed.py --model tiny --dtype float32 --same-weights    # on any laptop

Models have the real geometry and random weights. Samples have 1 to 3 images with sides of 224 to 896 pixels and 30 to
400 tokens of text. The loss is the mean over all answer tokens of the global batch; the optimizer is AdamW on fp32
master weights with clipping. Sides:

  ours-torch, ours-te  the engine on plain torch layers or Transformer Engine's, packed to each --token-budget
  fsdp2                transformers and torch's `fully_shard`, SDPA without cuDNN's kernels, fused AdamW; samples are
                       sorted by length, padded to the longest of each micro-batch, and collated beforehand in pinned
                       memory

The sides run one after the other in separate processes, over the same global batches. A step is everything from samples
in memory to updated weights, without decoding of images. Times are medians (minimum, maximum) over the steps after
warm-up; padding does not count as tokens. TFLOP/s count the operations that the model needs
(`mbridge_config.plan.flops`), and are compared with a matrix product of 8192 x 8192 in the same process. Without
--same-weights, each side draws its own random weights, so the losses agree only roughly.

Memory per parameter: ours 18 bytes (weight 2, gradient 4, master weight 4, moments 8), fsdp2 16 and bf16 copies of the
layers in use. If activations do not fit, a side runs again with recomputation (--recompute auto). A variant that still
does not fit is reported as out of memory.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import run_ladder, run_process, speedups, table, write_weights
from transformers import AutoModelForImageTextToText
from vlm_sft_data import GEOMETRIES, write_config

CASES = ("ours-torch", "ours-te", "fsdp2")


def attempts(case: str, recompute: str) -> list[list[dict[str, bool | None]]]:
    """Return the settings to try, fastest first; each of an inner list takes the sizes that fit none before it."""
    kept = [True, False] if case == "fsdp2" else [None]
    off, on = ([{"recompute": value, "keep_gathered": keep} for keep in kept] for value in (False, True))
    return {"off": [off], "on": [on], "both": [off, on], "auto": [off + on]}[recompute]


def run_case(case: str, arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return the results of all variants of one side, including failures."""
    sizes_name = "micro_batch_size" if case == "fsdp2" else "token_budget"
    settings = {name: value for name, value in vars(arguments).items() if name not in ("cases", "output")}
    settings |= {"case": case, "directory": str(directory)}

    def run(choice: dict[str, Any]) -> list[dict[str, Any]]:
        return run_process("vlm_sft_cases.py", settings | choice)

    sizes = getattr(arguments, sizes_name)
    return [
        result
        for ladder in attempts(case, arguments.recompute)
        for result in run_ladder(run, sizes_name, sizes, ladder)
    ]


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
            write_weights(AutoModelForImageTextToText, directory, getattr(torch, arguments.dtype))
        for case in arguments.cases:
            report["results"] += run_case(case, arguments, directory)
            report["speedup"] = speedups(report["results"], CASES, "fsdp2")
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(report, indent=1))
    devices = {result["device"] for result in report["results"] if "device" in result}
    print(f"\n{', '.join(devices) or 'no result'}, torch {report['torch']}, {arguments.model}, {arguments.dtype}")
    print(table(report["results"]), end="")
    for case, ratio in report["speedup"].items():
        print(f"{case}: {ratio:.2f} times the tokens/s of fsdp2, each side's best variant")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()

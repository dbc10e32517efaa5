"""Run each side of a benchmark in a separate process, and summarize the results."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def run_ladder(
    run: Callable[[dict[str, Any]], list[dict[str, Any]]],
    sizes_name: str,
    sizes: Sequence[int],
    choices: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return results from small to large sizes; each of `choices` takes the sizes that fit none before it."""
    found: list[dict[str, Any]] = []
    for choice in choices:
        lines = run(choice | {sizes_name: list(sizes)})
        found += lines
        sizes = sizes[sum("error" not in line for line in lines) :]
        if not any("out of memory" in line.get("error", "") for line in lines):
            break
    return found


def run_process(script: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `script` until its first failure, and return its results, which it writes to `settings["directory"]`."""
    results = Path(settings["directory"]) / "results.jsonl"
    results.unlink(missing_ok=True)
    settings = settings | {"results": str(results)}
    print(f"{settings['case']} {describe(settings)}", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(script)), json.dumps(settings)]
    # Micro-batches of different lengths would fragment GPU memory otherwise.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    if settings.get("device") == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    code = subprocess.run(command, env=environment, check=False).returncode
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for line in lines:
        if "error" not in line:
            line["summary"] = summarize(line)
    if code:
        lines.append(settings | {"variant": "", "error": f"the process ended with status {code}"})
    return lines


def describe(result: dict[str, Any]) -> str:
    """Describe the settings of a side in words."""
    words = ["recomputed"] if result["recompute"] else []
    if result["keep_gathered"] is not None:
        words.append("weights kept gathered" if result["keep_gathered"] else "weights gathered twice")
    return ", ".join(words)


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Return median, minimum and maximum of the rates over the steps."""

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


def table(results: Sequence[dict[str, Any]]) -> str:
    """Format results as a Markdown table."""
    header = ("side", "variant", "tokens/s (least, most)", "TFLOP/s", "of matmul", "peak GiB", "first loss", "last")
    rows = [header, ("---",) * len(header)]
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
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def best(results: Sequence[dict[str, Any]], case: str) -> dict[str, Any] | None:
    """Return the variant of a side with the most tokens per second."""
    done = [result for result in results if result["case"] == case and "summary" in result]
    return max(done, key=lambda result: float(result["summary"]["tokens_per_second"][0]), default=None)


def speedups(results: Sequence[dict[str, Any]], cases: Sequence[str], baseline: str) -> dict[str, float]:
    """Return tokens per second of the best variant of each side over the best of `baseline`."""
    other = best(results, baseline)
    mine = {case: best(results, case) for case in cases}
    return {
        case: result["summary"]["tokens_per_second"][0] / other["summary"]["tokens_per_second"][0]
        for case, result in mine.items()
        if result is not None and other is not None and case != baseline
    }


def write_weights(auto: Any, directory: Path, dtype: torch.dtype) -> None:
    """Write random weights for all sides to load, made on the GPU if there is one."""
    import transformers

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = auto.from_config(transformers.AutoConfig.from_pretrained(directory), dtype=dtype)
    model.save_pretrained(directory)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

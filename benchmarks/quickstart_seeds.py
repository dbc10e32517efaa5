"""Accuracy on held-out problems before and after the quickstart's GRPO, for several seeds.

    ./uvw run python benchmarks/quickstart_seeds.py            # seeds 1 2 3, one after another

Each seed has its own problems, model, warm-up and random streams. Accuracy is the share of 256 held-out problems that
one sampled answer (temperature 1) solves. Exits with 1 if the accuracy of a seed rises by less than 0.3 or its run
takes more than 5 minutes.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LEAST_RISE = 0.3
MOST_SECONDS = 300.0


def main(seeds: list[int]) -> int:
    failed = False
    print("seed  before  after   rise  seconds")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            started = time.perf_counter()
            command = ["mbridge-reasoning", f"actor.seed={seed}", f"data.seed={seed}", f"runner.output_dir={directory}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            lines = (Path(directory) / "quickstart" / "metrics.jsonl").read_text().splitlines()
            accuracies = [
                record["validation/accuracy"] for record in map(json.loads, lines) if "validation/accuracy" in record
            ]
        rise = accuracies[-1] - accuracies[0]
        print(f"{seed:4}  {accuracies[0]:6.3f}  {accuracies[-1]:5.3f}  {rise:5.3f}  {seconds:7.0f}", flush=True)
        failed |= rise < LEAST_RISE or seconds > MOST_SECONDS
    return int(failed)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or [1, 2, 3]))

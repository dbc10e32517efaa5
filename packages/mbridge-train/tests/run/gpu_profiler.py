"""Checks of profiles and throughput that need a GPU: kernels in the trace, and the known peak of this GPU.

    PYTHONPATH=. python packages/mbridge-train/tests/run/gpu_profiler.py

Run from the root of the repository. Prints one line per check and exits with 1 if one fails.
"""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from mbridge_config import HFFacts
from mbridge_config.schema.actor import ModelConfig, ProfilerConfig
from mbridge_train.engine.throughput import Throughput
from mbridge_train.run.process_group import join, leave
from mbridge_train.run.profiler import StepProfiler

from testing.tiny_models import make_model


def main() -> int:
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29577")
    device = join()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        profiler = StepProfiler(ProfilerConfig(steps=[2, 3], activities=["cuda"]), directory)
        matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        for number in range(1, 5):
            with profiler.step(number):
                matrix @ matrix
        checks = {"one trace for each chosen step": len(list(directory.glob("*.json.gz"))) == 2}
        for number in (2, 3):
            file = directory / f"chrome_trace_rank0_step{number}.json.gz"
            events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
            kernels = sum(event.get("cat") == "kernel" for event in events)
            checks[f"step {number} has the kernel of its one product ({kernels})"] = kernels == 1
        facts = HFFacts.load(make_model("qwen2", directory / "model"))
    name = torch.cuda.get_device_name()
    peak = Throughput(facts, ModelConfig(precision="bf16")).peak
    checks[f"the peak of {name} is known ({peak} TFLOP/s)"] = peak is not None
    for text, is_right in checks.items():
        print(f"{'ok' if is_right else 'FAIL'}: {text}")
    leave()
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

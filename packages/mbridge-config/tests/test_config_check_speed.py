"""`check` takes less than a second, and loads nothing that takes longer."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

RUN = """
import contextlib, io, sys, time
start = time.process_time()
from mbridge_config.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
print(code, time.process_time() - start, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def checked(*words: str) -> tuple[float, set[str]]:
    """Seconds of processor time, to which other processes on the machine add little, and what was imported."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "check", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, seconds, *modules = done.stdout.split()
    assert code == "0"
    return float(seconds), set(modules)


def test_check_takes_less_than_a_second(yaml: Path, real_model: Callable[[str], Path]) -> None:
    model = real_model("qwen2.5-1.5b")
    words = ["run", "--config-path", str(yaml), "--world-size", "8", "--memory", "80", "actor.model.precision=bf16"]
    words += [f"actor.megatron.ckpt_convertor.hf_model_path={model}", f"actor.tokenizer.tokenizer_model={model}"]
    _, modules = checked(*words)  # and the modules are compiled
    assert "hydra" in modules and "mbridge_config" in modules
    assert not modules & {"torch", "transformers", "numpy", "megatron", "safetensors"}
    medians = []
    for _ in range(3):  # a machine under load may need another try
        medians.append(statistics.median(checked(*words)[0] for _ in range(3)))
        if medians[-1] < 1:
            return
    raise AssertionError(f"medians of three: {medians} s")

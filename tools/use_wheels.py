"""Build every package's wheel and use it as a user would, in environments that hold nothing else: `nox -s wheel`.

    python tools/use_wheels.py                # all parts, two at a time
    python tools/use_wheels.py model pip      # these parts
    python tools/use_wheels.py --newest       # with the newest dependencies, not those that pyproject.toml pins

The install lines are those of the READMEs. The workspace's settings of uv do not count here: they exclude requirements
of megatron-bridge, which hides from a developer what a user runs into. The programs in `testing/wheel_uses/` are the
smallest ones for the package that they use.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
USES = ROOT / "testing" / "wheel_uses"
UV = os.environ.get("UV", "uv")  # `uv run` says which uv it is
# Of the workspace, what each package brings along.
TRAIN = {"mbridge-config", "mbridge-model", "mbridge-ckpt", "mbridge-train"}
FOLDERS = {
    file.parent.name if file.parts[-3] == "packages" else f"mbridge-{file.parent.name}": file.parent
    for file in sorted([*ROOT.glob("packages/*/README.md"), *ROOT.glob("apps/*/README.md")])
}
TWO_STEPS = (
    "runner.max_steps=2",
    "runner.save_interval=2",
    "runner.val_check_interval=-1",
    "runner.output_dir=.",
    "actor.lr_sched.lr_warmup_iters=0",
)
REASONING = ("quickstart.warmup_steps=5", "quickstart.warmup_short_steps=1", "data.rollout_batch_size=4")
SFT = ("actor.global_batch_size=8", "actor.lr_sched.lr_decay_style=constant", "data.num_workers=0")


class UseError(Exception):
    """A command failed; the message has it and its output."""


class Place:
    """A folder with an empty environment, in which commands run.

    Args:
        folder: made here.
        wheels: where pip and uv find our packages.
        constraints: a file of pinned versions; None for the newest.
        seed: with pip in it.
    """

    def __init__(self, folder: Path, wheels: Path, constraints: Path | None, *, seed: bool = False) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "uv.toml").touch()  # uv looks no further up, where the workspace's settings are
        environment = folder / "env"
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
            "PATH": f"{environment / 'bin'}:{Path(UV).parent.absolute()}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(environment),
            "UV_FIND_LINKS": str(wheels),
            "PIP_FIND_LINKS": f"{wheels} {os.environ.get('PIP_FIND_LINKS', '')}".strip(),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self.variables.pop("UV_PROJECT_ENVIRONMENT", None)
        if constraints is not None:
            self.variables |= {"UV_CONSTRAINT": str(constraints), "PIP_CONSTRAINT": str(constraints)}
        self.run(UV, "venv", *(["--seed"] if seed else []), "--python", sys.executable, environment)

    def run(self, *words: str | Path) -> str:
        """Run a command and return what it printed.

        Raises:
            UseError: it failed.
        """
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UseError(f"{' '.join(map(str, words))}\n{done.stdout}\nexit code {done.returncode}")
        return done.stdout

    def install(self, package: str, program: str) -> None:
        """Run the README's lines for `program`, pip or uv."""
        for line in install_lines(package, program):
            self.run(*shlex.split(line))

    def use(self, program: str, *words: str | Path) -> None:
        """Run one of the programs beside this one, and print what it says of itself."""
        print(self.run("python", "-I", USES / program, *words).splitlines()[-1])

    def check(self, package: str, brings: set[str]) -> None:
        """Is the package alone but for what it needs?"""
        print(self.run("python", "-I", ROOT / "tools" / "check_wheel.py", package, *sorted(brings)).splitlines()[-1])


def install_lines(package: str, program: str) -> list[str]:
    """The lines of the package's README that begin with `pip install` or with `uv pip install`.

    Raises:
        UseError: there is none, or none that installs the package.
    """
    start = {"pip": "pip install", "uv": "uv pip install"}[program]
    lines = re.findall(rf"^({start} .*?)(?:  +#.*)?$", (FOLDERS[package] / "README.md").read_text(), re.M)
    if f"{start} {package}" not in lines:
        raise UseError(f"{FOLDERS[package]}/README.md has no line `{start} {package}`")
    return lines


def config(make: Callable[..., Place]) -> None:
    """mbridge-config by either program, without torch."""
    for program in ("uv", "pip"):
        place = make(f"config-{program}", seed=program == "pip")
        place.install("mbridge-config", program)
        place.check("mbridge-config", {"mbridge-config"})
        place.run("mbridge-config", "schema", "reasoning")


def model(make: Callable[..., Place]) -> None:
    """mbridge-model: patches in a foreign loop, before megatron-bridge is there; then load, export and save."""
    place = make("model")
    package, bridge = install_lines("mbridge-model", "uv")
    place.run(*package.split())
    place.check("mbridge-model", {"mbridge-model"})
    place.use("megatron_loop.py")
    place.run(*bridge.split())
    place.run("python", "-I", USES / "tiny_models.py", "models")
    models = ("models/qwen2", "models/qwen3_vl")
    place.use("load_export_save.py", "saved", *models)
    two_ranks = ("torchrun", "--standalone", "--nproc_per_node=2")
    print(place.run(*two_ranks, USES / "load_export_save.py", "saved-by-two", *models).splitlines()[-1])


def train(make: Callable[..., Place]) -> None:
    """mbridge-train: the losses in a loop of plain PyTorch, without megatron-bridge."""
    place = make("train")
    place.run(*install_lines("mbridge-train", "uv")[0].split())
    place.check("mbridge-train", TRAIN)
    print(*place.run("python", "-I", USES / "torch_loop.py").splitlines(), sep="\n")


def apps(make: Callable[..., Place]) -> None:
    """Two steps of either app, and what mbridge-ckpt, installed alone, makes of the checkpoints."""
    runs = make("apps")
    runs.install("mbridge-reasoning", "uv")
    runs.install("mbridge-sft", "uv")
    runs.run("mbridge-reasoning", *TWO_STEPS, *REASONING)
    runs.run("mbridge-sft", *TWO_STEPS, *SFT)
    alone = make("ckpt")
    alone.install("mbridge-ckpt", "uv")
    alone.check("mbridge-ckpt", {"mbridge-ckpt"})
    for run in ("quickstart", "quickstart-sft"):
        checkpoints = runs.folder / run / "checkpoints"
        alone.run("mbridge-ckpt", "ls", checkpoints)
        alone.run("mbridge-ckpt", "show", checkpoints / "global_step_2", "--tensors")
        alone.run("mbridge-ckpt", "verify", checkpoints / "global_step_2", "--full")
        alone.run("mbridge-ckpt", "export-hf", checkpoints / "global_step_2", f"{run}-hf")
        said = alone.run(
            "python", "-I", USES / "same_tensors.py", f"{run}-hf", checkpoints / "global_step_2/actor/hf_model"
        )
        print(f"{run}: two steps, listed, shown, verified, exported: {said}", end="")


def pip(make: Callable[..., Place]) -> None:
    """The same by pip, which cannot leave a requirement out. Torch, 5 GB, comes by uv, from its cache."""
    place = make("pip", seed=True)
    place.run("uv", "pip", "install", "torch>=2.11,<2.12")
    for package in FOLDERS:
        place.install(package, "pip")
    place.run("python", "-I", USES / "tiny_models.py", "models")
    place.use("load_export_save.py", "saved", "models/qwen2")
    print(place.run("mbridge-config", "check", "reasoning/quickstart").splitlines()[-1])


PARTS = {part.__name__: part for part in (apps, model, pip, train, config)}  # the longest first


def run_part(name: str, folder: Path, constraints: Path | None) -> None:
    """Run a part; say how long it took.

    Raises:
        UseError: something of it failed.
    """
    start = time.monotonic()
    PARTS[name](lambda where, **options: Place(folder / where, folder / "wheels", constraints, **options))
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Use the wheels of all packages in empty environments.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--newest", action="store_true", help="dependencies without the workspace's pins")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    build = ROOT / ".nox"  # beside the cache's hard links, and ignored by git
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=build) as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        subprocess.run(
            [UV, "build", "--quiet", "--all-packages", "--wheel", "--out-dir", str(folder / "wheels")],
            cwd=ROOT,
            check=True,
        )
        constraints = None
        if not arguments.newest:
            pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
            constraints = folder / "constraints.txt"
            constraints.write_text("\n".join(pins))
        started = [pool.submit(run_part, part, folder, constraints) for part in arguments.parts or PARTS]
        failures = [str(error) for error in (part.exception() for part in started) if error is not None]
    print(*failures, sep="\n\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

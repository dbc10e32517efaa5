"""`uvw` on machines without some programs: real venv and pip, with a PATH of only the programs that a test allows.

The tests install a tiny wheel named `uv`, which pip finds through its settings, so that no network is needed.
"""

import compileall
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "sed", "dirname", "mkdir", "mv", "rm", "sleep")
PINNED = next(
    line.split("=")[1].split()[0] for line in (ROOT / "uvw").read_text().splitlines() if line.startswith("uv_version=")
)
# Prints its arguments; exits with 7 on the argument `fail`.
UV_PROGRAM = """#!/bin/sh
if [ "$1" = --version ]; then echo "uv {version} (x86_64)"; exit 0; fi
printf '{label}'; printf ' <%s>' "$@"; echo; echo "PATH=$PATH"; echo "compile=${{UV_COMPILE_BYTECODE:-}}"
[ "$1" != fail ] || exit 7
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def install_python(prefix: Path, *, ensurepip: bool, pip: bool) -> Path:
    """Make a Python from the program and library of the running one, without the parts that the machine lacks."""
    standard_library = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix}))
    library = prefix / "lib" / standard_library.name
    library.mkdir(parents=True)
    for entry in standard_library.iterdir():
        if entry.name != "site-packages" and (ensurepip or entry.name != "ensurepip"):
            (library / entry.name).symlink_to(entry)
    (library / "site-packages").mkdir()
    if pip:
        bundled = next(iter((standard_library / "ensurepip" / "_bundled").glob("pip-*.whl")), None)
        if bundled is None:
            pytest.skip("this Python has no pip to take along")
        with zipfile.ZipFile(bundled) as wheel:
            wheel.extractall(library / "site-packages")
        compileall.compile_dir(library / "site-packages", quiet=2)
    (prefix / "bin").mkdir()
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(Path(sys.base_prefix) / "bin" / name, prefix / "bin" / "python3")
    return prefix / "bin" / "python3"


@pytest.fixture(scope="module")
def with_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_python(tmp_path_factory.mktemp("venv"), ensurepip=True, pip=False)


@pytest.fixture(scope="module")
def with_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_python(tmp_path_factory.mktemp("pip"), ensurepip=False, pip=True)


@pytest.fixture(scope="module")
def with_neither(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_python(tmp_path_factory.mktemp("neither"), ensurepip=False, pip=False)


class Machine:
    """A fresh clone (`uvw` and `pyproject.toml`) and a PATH with only the POSIX tools."""

    def __init__(self, directory: Path) -> None:
        self.clone = directory / "clone with a space"
        self.clone.mkdir()
        for name in ("uvw", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone / name)
        self.bin = directory / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            path = shutil.which(tool)
            assert path is not None, tool
            (self.bin / tool).symlink_to(path)
        self.index = directory / "index"
        self.add_wheel(PINNED)
        self.own = self.clone / ".uv"

    def add_wheel(self, version: str) -> None:
        self.index.mkdir(exist_ok=True)
        with zipfile.ZipFile(self.index / f"uv-{version}-py3-none-any.whl", "w") as wheel:
            info = f"uv-{version}.dist-info"
            program = zipfile.ZipInfo(f"uv-{version}.data/scripts/uv")
            program.external_attr = 0o100755 << 16
            wheel.writestr(program, UV_PROGRAM.format(version=version, label="own"))
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: uv\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    def add(self, name: str, program: Path) -> None:
        # Not a link: its environments would look for the library beside the link.
        executable(self.bin / name, f'#!/bin/sh\nexec "{program}" "$@"\n')

    def add_uv(self, version: str) -> None:
        executable(self.bin / "uv", UV_PROGRAM.format(version=version, label="path"))

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(self.clone / "uvw"), *arguments],
            env={"PATH": str(self.bin), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.index.as_uri(), **environment},
            cwd=self.clone,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_installed_version_satisfies_the_required_one() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["required-version"]
    assert required.startswith(">=")
    assert tuple(map(int, PINNED.split("."))) >= tuple(map(int, required[2:].split(".")))


@pytest.mark.parametrize("version", ["0.11.25", "0.11.100", "0.12.0", "1.0", "0.11.25rc1"])
def test_new_enough_uv_on_path_is_used(machine: Machine, version: str) -> None:
    machine.add_uv(version)
    done = machine.run("run", "a b", "", "*")
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, "path <run> <a b> <> <*>", "")
    assert not machine.own.exists()
    assert machine.run("fail").returncode == 7


def test_only_the_first_installation_compiles_bytecode(machine: Machine) -> None:
    machine.add_uv(PINNED)
    assert "compile=1" in machine.run("sync").stdout
    (machine.clone / ".venv").mkdir()
    assert "compile=\n" in machine.run("sync").stdout


@pytest.mark.parametrize("version", ["0.11.24", "0.9.30", "0.11"])
def test_old_uv_on_path_is_passed_over(machine: Machine, version: str) -> None:
    machine.add_uv(version)
    executable(machine.own / "bin" / "uv", UV_PROGRAM.format(version="0.11.25", label="own"))
    done = machine.run("run")
    assert done.stdout.splitlines()[:2] == ["own <run>", f"PATH={machine.own}/bin:{machine.bin}"]


def test_own_uv_is_installed_once_with_venv(machine: Machine, with_venv: Path) -> None:
    machine.add("python3", with_venv)
    done = machine.run("run", "a b")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "own <run> <a b>"), done.stderr
    assert done.stderr == f"uvw: installing uv {PINNED} into {machine.own}\n"
    again = machine.run("fail")
    assert (again.returncode, again.stdout.splitlines()[0], again.stderr) == (7, "own <fail>", "")


def test_pip_serves_where_ensurepip_is_missing(machine: Machine, with_pip: Path, tmp_path: Path) -> None:
    machine.add("python3", with_pip)
    # Settings that would redirect the installation, or forbid it.
    settings = {"PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PIP_PREFIX": str(tmp_path / "elsewhere")}
    done = machine.run("run", **settings)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "own <run>"), done.stderr
    assert not (tmp_path / "elsewhere").exists()
    assert [path.name for path in machine.own.iterdir()] == ["bin"]


def test_neither_venv_nor_pip_says_what_to_install(machine: Machine, with_neither: Path) -> None:
    machine.add("python3", with_neither)
    done = machine.run("run")
    assert done.returncode == 1
    assert "python3 has neither a working venv module nor pip" in done.stderr
    assert "apt install python3-venv" in done.stderr
    assert "No module named pip" in done.stderr
    assert not list(machine.own.glob("making.*"))


def test_no_python_says_what_to_install(machine: Machine) -> None:
    # An old Python from uvw's point of view: it fails the check of its version.
    executable(machine.bin / "python3", "#!/bin/sh\nexit 1\n")
    done = machine.run("run")
    assert done.returncode == 1
    assert "no Python 3.8 or newer on PATH" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_python_may_have_another_name(machine: Machine, with_venv: Path) -> None:
    executable(machine.bin / "python3", "#!/bin/sh\nexit 127\n")  # a shim without a target
    machine.add("python", with_venv)
    assert machine.run("run").stdout.startswith("own <run>")


def test_failed_download_is_an_error_and_done_over(machine: Machine, with_pip: Path) -> None:
    machine.add("python3", with_pip)
    shutil.rmtree(machine.index)
    machine.index.mkdir()
    done = machine.run("run")
    assert done.returncode == 1
    assert done.stderr.endswith(f"uvw: pip could not install uv {PINNED} (its message is above)\n")
    assert "No matching distribution" in done.stderr
    machine.add_wheel(PINNED)
    assert machine.run("run").stdout.startswith("own <run>")


def test_outdated_own_uv_is_replaced(machine: Machine, with_pip: Path) -> None:
    machine.add("python3", with_pip)
    executable(machine.own / "bin" / "uv", UV_PROGRAM.format(version="0.9.0", label="outdated"))
    assert machine.run("run").stdout.startswith("own <run>")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_installation_is_done_over(machine: Machine, with_pip: Path, how: signal.Signals) -> None:
    machine.add("python3", with_pip)
    (machine.own / "bin").mkdir(parents=True)
    (machine.own / "bin" / "uv").write_bytes(b"\x7fELF cut off")
    (machine.own / "bin" / "uv").chmod(0o755)
    process = machine.start("run")
    deadline = time.monotonic() + 60
    while not list(machine.own.glob("making.*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert bool(list(machine.own.glob("making.*"))) == (how == signal.SIGKILL)
    done = machine.run("run")
    assert done.stdout.startswith("own <run>"), done.stderr
    assert not list(machine.own.glob("making.*"))


def test_two_installations_at_once(machine: Machine, with_pip: Path) -> None:
    machine.add("python3", with_pip)
    processes = [machine.start("run", str(number)) for number in range(3)]
    for number, process in enumerate(processes):
        output, errors = process.communicate(timeout=120)
        assert output.startswith(f"own <run> <{number}>"), errors
    assert [path.name for path in machine.own.iterdir()] == ["bin"]

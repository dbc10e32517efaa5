"""Pin every version of the workspace's resolution in the root `pyproject.toml`, or check that all are pinned.

    nox -s pins              # resolve anew and rewrite the pins
    nox -s pins -- --check   # fail if a package of the resolution has no pin

A lock file contains download addresses, which differ from site to site, so git has these pins instead: with them uv
resolves to the same versions everywhere. This program owns the lines between the two markers.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

BEGIN = "# pins: begin (written by `nox -s pins`)\n"
END = "# pins: end\n"
# For sources that do not declare a build system.
LEGACY_BUILD_REQUIREMENTS = ("setuptools", "wheel")


class PinError(Exception):
    """The pins differ from the resolution, or `pyproject.toml` has no place for pins."""


def member_files(root: Path) -> list[Path]:
    """Return the `pyproject.toml` of every workspace member, in order."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["uv"]
    return sorted(
        path for pattern in settings["workspace"]["members"] for path in root.glob(f"{pattern}/pyproject.toml")
    )


def replace_pins(text: str, pins: list[str], build_pins: list[str]) -> str:
    """Return the text of `pyproject.toml` with `pins` between the markers, possibly none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise PinError(f"pyproject.toml needs one line each of {BEGIN.strip()!r} and {END.strip()!r} in [tool.uv]")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    block = ""
    for key, values in (("constraint-dependencies", pins), ("build-constraint-dependencies", build_pins)):
        if values:
            block += f"{key} = [\n" + "".join(f'    "{value}",\n' for value in values) + "]\n"
    return head + BEGIN + block + END + tail


def locked_versions(lock: str) -> list[str]:
    """Return `name==version` of every package of a `uv.lock` that comes from a registry, sorted."""
    versions: dict[str, str] = {}
    for package in tomllib.loads(lock)["package"]:
        if "registry" not in package["source"]:
            continue
        name, version = package["name"], package["version"]
        if versions.setdefault(name, version) != version:
            raise PinError(f"{name} resolves to {versions[name]} and {version}, and a pin can hold only one")
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def resolve(root: Path, text: str) -> list[str]:
    """Resolve the workspace with `text` as its root `pyproject.toml`, in a copy, and list the versions."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for source in [root / ".python-version", *member_files(root)]:
            target = copy / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        (copy / "pyproject.toml").write_text(text)
        _uv("lock", "--quiet", "--project", str(copy))
        return locked_versions((copy / "uv.lock").read_text())


def resolve_build(root: Path) -> list[str]:
    """Resolve the build requirements of the members, and of sources without a build system."""
    requirements = set(LEGACY_BUILD_REQUIREMENTS)
    for path in member_files(root):
        requirements.update(tomllib.loads(path.read_text())["build-system"]["requires"])
    with tempfile.TemporaryDirectory() as name:
        listing = Path(name) / "build.in"
        listing.write_text("\n".join(sorted(requirements)))
        python = (root / ".python-version").read_text().strip()
        options = ("--quiet", "--no-header", "--no-annotate", "--no-config", "--python-version", python)
        return sorted(_uv("pip", "compile", *options, str(listing)).split())


def differences(pins: list[str], resolution: list[str]) -> list[str]:
    """Return one line for every pin that is missing, different or unused."""
    pinned, resolved = (dict(entry.split("==") for entry in entries) for entries in (pins, resolution))
    lines = [f"{name}=={version} is not pinned" for name, version in resolved.items() if name not in pinned]
    lines += [
        f"{name} is pinned to {pinned[name]} but resolves to {version}"
        for name, version in resolved.items()
        if pinned.get(name, version) != version
    ]
    return lines + [f"{name} is pinned, but nothing needs it" for name in pinned if name not in resolved]


def check(root: Path) -> None:
    """Raise `PinError` unless the pins equal the resolution."""
    text = (root / "pyproject.toml").read_text()
    settings = tomllib.loads(text)["tool"]["uv"]
    problems = differences(settings.get("constraint-dependencies", []), resolve(root, text))
    build_pins = {entry.split("==")[0] for entry in settings.get("build-constraint-dependencies", [])}
    problems += [
        f"{entry} (build) is not pinned" for entry in resolve_build(root) if entry.split("==")[0] not in build_pins
    ]
    if problems:
        raise PinError("\n".join([*problems, "Run `nox -s pins` and commit pyproject.toml."]))


def _uv(*arguments: str) -> str:
    # set by `uv run`
    done = subprocess.run([os.environ.get("UV", "uv"), *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise PinError(f"uv {arguments[0]} failed (its message is above)")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Pin every version of the workspace's resolution.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a package is unpinned")
    root = Path(__file__).parents[1]
    try:
        if parser.parse_args().check:
            check(root)
        else:
            path = root / "pyproject.toml"
            pins = resolve(root, replace_pins(path.read_text(), [], []))
            # Read again, because the file may have changed while uv resolved.
            path.write_text(replace_pins(path.read_text(), pins, resolve_build(root)))
            print(f"{len(pins)} packages pinned in {path.name}")
    except PinError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

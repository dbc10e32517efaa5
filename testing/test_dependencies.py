"""Each package declares the distributions that its source imports."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from testing.test_rooms import SOURCES, imports

BROUGHT_ALONG = {"triton"}  # with the GPU builds of torch, in the one release that each of them needs


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("package", SOURCES)
def test_imports_are_declared(package: str) -> None:
    project = tomllib.loads((SOURCES[package].parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    declared = {normalized(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}
    distributions = packages_distributions()
    undeclared = []
    for found in imports(SOURCES[package]):
        top = found.module.partition(".")[0]
        names = {normalized(name) for name in distributions.get(top, [top])}
        if top not in {package, *sys.stdlib_module_names, *BROUGHT_ALONG} and not names & declared:
            undeclared.append(f"{found.place}: {top}")
    assert undeclared == []
    # mbridge-ckpt takes later releases of torch too: pip would first download one of those for packages that join it
    # with the others, unless they have a bound of their own.
    assert "torch" not in declared or package == "mbridge_ckpt" or "torch>=2.11,<2.12" in requirements

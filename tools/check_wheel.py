"""Check that a package is complete and alone in the environment of the running Python. Used by `nox -s wheel`.

python check_wheel.py PACKAGE EXPECTED_PACKAGE…
"""

import importlib.metadata
import subprocess
import sys

# The best of a few starts, because the first one compiles the modules.
STARTS = 3
CONFIG_IMPORT_SECONDS = 0.3


def import_seconds(module: str) -> float:
    """Return the import time in a new process, in CPU seconds, which do not depend on other load of the machine."""
    program = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def problems(package: str, expected: set[str]) -> list[str]:
    """Return the faults of the environment."""
    found = []
    seconds = min(import_seconds(package.replace("-", "_")) for _ in range(STARTS))
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    ours = {name for name in installed if name.startswith("mbridge")}
    print(f"{package}: imported in {seconds:.2f} s, alone but for {len(installed - ours)} dependencies")
    if ours != expected:
        found.append(f"{package} came with {sorted(ours)}, not with {sorted(expected)}")
    if package == "mbridge-config":
        if "torch" in installed:
            found.append("mbridge-config brought torch along")
        if seconds >= CONFIG_IMPORT_SECONDS:
            found.append(f"mbridge_config took {seconds:.2f} s to import, not less than {CONFIG_IMPORT_SECONDS} s")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1], set(sys.argv[2:]))) or 0)

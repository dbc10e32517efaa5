"""The command of an app: compose and check the config, then start the ranks. Torch is imported after the check."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mbridge_config import ConfigError, Problem, ReasoningConfig, SFTConfig, check, compose, parse_arguments
from mbridge_model.bridge.installed import require_bridge

from mbridge_train.run.launch import launch, outside_group, rank_count
from mbridge_train.run.metrics import require_backends


@dataclass(frozen=True, kw_only=True, slots=True)
class Application[Config: (ReasoningConfig, SFTConfig)]:
    """An app whose ranks call `<package>.loop.run(config, command)`."""

    program: str
    package: str
    """Import name of the package that contains the configs, of which `quickstart` is the default."""
    schema: type[Config]
    check_start: Callable[[Config], None]
    """Called before any rank starts; raises a user error for mistakes that would stop the run later."""


def run_application[Config: (ReasoningConfig, SFTConfig)](app: Application[Config], words: Sequence[str]) -> int:
    """Run the command line `words` (without the program's name) and return the exit code, as `launch` does.

    User errors are printed without a traceback.
    """
    try:
        return _run(app, list(words))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        # Each problem of a config says whether it is an error.
        print(error if isinstance(error, ConfigError) else f"error: {error}", file=sys.stderr)
        return 2


def _run[Config: (ReasoningConfig, SFTConfig)](app: Application[Config], words: list[str]) -> int:
    arguments = parse_arguments(words, program=app.program, package_config=app.package, default_config="quickstart")
    config = compose(
        arguments.config_name,
        arguments.config_path,
        arguments.overrides,
        package_config=app.package,
        schema=app.schema,
        strict=False,
    )
    group = outside_group(os.environ)
    report = check(config, world_size=None if group is None else group.world_size)
    if group is None and config.cluster.num_nodes > 1:
        report.problems.append(_one_host(config.cluster.num_nodes, app.package))
    report.raise_for_errors()
    require_bridge()
    if report.world_size is None:
        # The number of GPUs decides the number of ranks. Counting them imports torch, so the config is checked first.
        report = check(config, world_size=rank_count(config.launcher.nproc_per_node))
        report.raise_for_errors()
    app.check_start(config)
    if group is None or group.rank == 0:  # the only rank that writes metrics
        require_backends(config.runner.logger.logger_backends)
        if report.problems:
            print(report, file=sys.stderr)
    return launch(
        f"{app.package}.loop:run", (config, [app.program, *words]), nproc_per_node=config.launcher.nproc_per_node
    )


def _one_host(num_nodes: int, package: str) -> Problem:
    words = f"torchrun --nnodes={num_nodes} --nproc_per_node=<GPUs> --rdzv_backend=c10d --rdzv_endpoint=<host>:<port>"
    return Problem(
        id="one-host",
        key="cluster.num_nodes",
        value=num_nodes,
        reason="this command starts ranks on this host only",
        fix=f"start the run on every host with `{words} -m {package}.cli …`, or set cluster.num_nodes=1",
    )

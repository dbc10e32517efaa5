"""`mbridge-reasoning`: compose and check the config, then start the ranks. Nothing heavy is imported before."""

import os
import sys

from mbridge_config import ConfigError, Problem, check, compose, parse_arguments

PROGRAM = "mbridge-reasoning"


def main() -> int:
    """Exit code: 0; 2 for a mistake of the user, printed without a traceback; 130 for Ctrl-C; 1 for a crash."""
    try:
        return _main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        # A config's problems say by themselves which of them are errors.
        print(error if isinstance(error, ConfigError) else f"error: {error}", file=sys.stderr)
        return 2


def _main(words: list[str]) -> int:
    arguments = parse_arguments(words, program=PROGRAM, package_config="mbridge_reasoning", default_config="quickstart")
    config = compose(
        arguments.config_name,
        arguments.config_path,
        arguments.overrides,
        package_config="mbridge_reasoning",
        strict=False,
    )
    from mbridge_train.launch import launch, outside_group, rank_count

    from mbridge_reasoning.start import check_start

    group = outside_group(os.environ)
    report = check(config, world_size=None if group is None else group.world_size)
    if group is None and config.cluster.num_nodes > 1:
        report.problems.append(_one_host(config.cluster.num_nodes))
    report.raise_for_errors()
    if report.world_size is None:
        # The number of GPUs says how many ranks there will be. Asking for it imports torch, so the config comes first.
        report = check(config, world_size=rank_count(config.launcher.nproc_per_node))
        report.raise_for_errors()
    check_start(config)
    if report.problems and (group is None or group.rank == 0):
        print(report, file=sys.stderr)
    return launch(
        "mbridge_reasoning.loop:run", (config, [PROGRAM, *words]), nproc_per_node=config.launcher.nproc_per_node
    )


def _one_host(num_nodes: int) -> Problem:
    words = f"torchrun --nnodes={num_nodes} --nproc_per_node=<GPUs> --rdzv_backend=c10d --rdzv_endpoint=<host>:<port>"
    return Problem(
        id="one-host",
        key="cluster.num_nodes",
        value=num_nodes,
        reason="this command starts ranks on this host alone",
        fix=f"start the run on every host with `{words} -m mbridge_reasoning.cli …`, or set cluster.num_nodes=1",
    )


if __name__ == "__main__":
    sys.exit(main())

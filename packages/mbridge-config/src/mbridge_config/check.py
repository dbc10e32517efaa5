"""Find everything that is wrong with a config at once, before anything is loaded.

report = check(config, world_size=8)
report.raise_for_errors()
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mbridge_config.facts.directories import TOKENIZER_KEY, hf_directory, hf_key, tokenizer_directory
from mbridge_config.facts.model import HFFacts
from mbridge_config.facts.quickstart import made_model_facts
from mbridge_config.facts.tokenizer import tokenizer_size
from mbridge_config.paths import is_there
from mbridge_config.plan.plan import ParallelPlan, make_plan
from mbridge_config.problems import ConfigError, Problem, Severity, ordered, render
from mbridge_config.rules import REASONING, SFT, Context, Rule
from mbridge_config.rules.optimizer import over_the_run
from mbridge_config.schema.run_kinds import RunConfig
from mbridge_config.schema.sft import SFTConfig

_Read = TypeVar("_Read")


@dataclasses.dataclass(kw_only=True, slots=True)
class Report:
    """What `check` found. `facts` and `plan` are None if they could not be determined."""

    problems: list[Problem]
    facts: HFFacts | None = None
    tokenizer_size: int | None = None
    world_size: int | None = None
    plan: ParallelPlan | None = None

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that keep the config from running."""
        return [problem for problem in self.problems if problem.severity is Severity.ERROR]

    def raise_for_errors(self) -> None:
        """Raise `ConfigError` with all problems if one of them is an error."""
        if self.errors:
            raise ConfigError(self.problems)

    def __str__(self) -> str:
        return render(self.problems)


def check(config: RunConfig, world_size: int | None = None) -> Report:
    """Apply every rule to `config`, and add what `compose(..., strict=False)` found.

    Rules about ranks need `world_size`; without it they use launcher.nproc_per_node x cluster.num_nodes, and are
    skipped if that is not set either. Reads config.json and tokenizer files; raises nothing.
    """
    problems = list(config.provenance.problems)
    if world_size is None and config.launcher.nproc_per_node is not None:
        world_size = config.launcher.nproc_per_node * config.cluster.num_nodes
    facts = _read(config, hf_key(config), hf_directory, HFFacts.load, made_model_facts, problems)
    size = None
    # The tokenizer of SFT is the model's unless its key is set, so an empty model key is one mistake, not two.
    if not isinstance(config, SFTConfig) or config.actor.tokenizer.tokenizer_model:
        size = _read(config, TOKENIZER_KEY, tokenizer_directory, tokenizer_size, lambda *_: None, problems)
    context = Context(config=config, facts=facts, tokenizer_size=size, world_size=world_size)
    for rule in rules_of(config):
        problems += rule.problems(context)
    model = config.actor.model
    ranks = world_size or model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    return Report(
        problems=ordered(problems),
        facts=facts,
        tokenizer_size=size,
        world_size=world_size,
        plan=make_plan(config, facts, ranks),
    )


def refuse_short_run(config: RunConfig, *, rows: int) -> None:
    """Raise `ConfigError` if the learning rate's schedule does not fit into a run over `rows` rows.

    For apps: `check` reads no data, so it can tell this only if the config alone decides how long the run is.
    """
    if problems := list(over_the_run.problems(Context(config=config, rows=rows))):
        raise ConfigError(problems)


def rules_of(config: RunConfig) -> tuple[Rule, ...]:
    """Return the rules of this kind of run."""
    return SFT if isinstance(config, SFTConfig) else REASONING


def _read(
    config: RunConfig,
    key: str,
    locate: Callable[[RunConfig], Path],
    read: Callable[[Path], _Read],
    made: Callable[[RunConfig, Path], _Read],
    problems: list[Problem],
) -> _Read | None:
    """Return what `read` finds in the directory that `key` names; add the key and its place to its problems.

    Of a directory that a quickstart is still going to create, return what `made` says.
    """
    if key in config.provenance.failed:
        return None
    try:
        directory = locate(config)
        return made(config, directory) if config.quickstart.enabled and not is_there(directory) else read(directory)
    except ConfigError as error:
        for problem in error.problems:
            where = problem.where or config.provenance.where(key)
            problems.append(dataclasses.replace(problem, key=key, where=where))
        return None

"""List the layouts of a run on given GPUs that pass the rules: parallel sizes, recomputation, micro-batches."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mbridge_config.check import Report, rules_of
from mbridge_config.plan.parameters import can_count
from mbridge_config.plan.plan import ParallelPlan, make_plan
from mbridge_config.problems import ConfigError, Problem, Severity
from mbridge_config.rules import Context
from mbridge_config.rules.batches import BUDGET, DYNAMIC, MICRO
from mbridge_config.rules.parallel import FIRST_STAGE, LAST_STAGE, PP, SP, TP, divisors
from mbridge_config.rules.precision import GRANULARITY, METHOD, RECOMPUTED
from mbridge_config.schema.keys import filled, get
from mbridge_config.schema.run_kinds import RunConfig

GPUS_PER_HOST = 8
"""Tensor parallelism communicates in each layer, so it stays on one host."""
ENOUGH_TOKENS = 8192
"""A micro-batch of fewer leaves an H100 waiting: of a 1.5B model, 4,096 tokens ran at 0.65 of the speed of 16,384,
8,192 at 0.91 (docs/memory.md)."""
MOST_TOKENS = 16384
HIGH_BUBBLE = 0.25

DISTRIBUTED = "actor.optim.use_distributed_optimizer"
NODES, PROCESSES = "cluster.num_nodes", "launcher.nproc_per_node"
KEYS = (
    *(TP, PP, FIRST_STAGE, LAST_STAGE, SP),
    *(GRANULARITY, METHOD, RECOMPUTED),
    *(MICRO, BUDGET),
    *(DISTRIBUTED, NODES, PROCESSES),
)
"""The keys that a layout may set. A rule that reads none of them finds the same in all layouts."""


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class ProposedLayout:
    """One way to run on `plan.world_size` GPUs: the values of its keys, those among them that differ from the config,
    and the resulting plan.

    `recomputed` is the share of layers that the backward pass recomputes.
    """

    values: Mapping[str, Any]
    changes: Mapping[str, Any]
    plan: ParallelPlan
    recomputed: float

    @property
    def tokens(self) -> int:
        """Return the tokens of the largest micro-batch."""
        return self.plan.max_tokens_per_micro_batch

    @property
    def peak(self) -> int:
        """Return the bytes on the rank that takes the most."""
        assert self.plan.peak is not None
        return self.plan.peak.peak

    @property
    def is_short(self) -> bool:
        """Return whether the micro-batch is too small to keep a GPU busy, although it could hold more sequences."""
        return self.tokens < ENOUGH_TOKENS and self.plan.micro_batches_of_longest > 1

    @property
    def rank(self) -> tuple[Any, ...]:
        """Return the sort key, best first: least communication, least pipeline, busy GPUs, least recomputation."""
        plan = self.plan
        wait = max(plan.pipeline_bubble, HIGH_BUBBLE)
        return (plan.tensor_parallel, plan.pipeline_parallel, wait, self.is_short, self.recomputed, -self.tokens)


def layouts(config: RunConfig, report: Report, gpus: int) -> list[ProposedLayout]:
    """Return all layouts on `gpus` GPUs that pass every rule, best first, regardless of memory.

    `report` is that of `check`, whose facts are used. Raises `ConfigError` if the model is unknown, or its parameters
    are not counted.
    """
    facts = report.facts
    if facts is None or not can_count(facts):
        reason = "the model is not known" if facts is None else f"the parameters of {facts.model_type} are not counted"
        fix = "correct the errors above" if facts is None else "use a model of a family that the README names"
        problem = Problem(id="no-estimate", reason=f"{reason}, so nothing fits", fix=fix)
        raise ConfigError([*report.errors, problem])
    rules = [rule for rule in rules_of(config) if set(rule.reads) & set(KEYS)]
    found = []
    for recomputed, values in _candidates(config, facts.num_layers, gpus):
        changed = with_values(config, values)
        plan = make_plan(changed, facts, gpus)
        if plan is None:
            continue
        context = Context(config=changed, facts=facts, tokenizer_size=report.tokenizer_size, world_size=gpus)
        if not any(problem.severity is Severity.ERROR for rule in rules for problem in rule.problems(context)):
            changes = {key: value for key, value in values.items() if get(config, key) != value}
            found.append(ProposedLayout(values=values, changes=changes, plan=plan, recomputed=recomputed))
    return sorted(found, key=lambda layout: layout.rank)


def other_errors(config: RunConfig, report: Report) -> list[Problem]:
    """Return the errors of `report` that no layout fixes."""
    about = {rule.id for rule in rules_of(config) if set(rule.reads) & set(KEYS)}
    return [problem for problem in report.errors if problem.id not in about]


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a config that differs from `config` in these keys and shares all sections without one of them with it."""
    changed = copy.copy(config)
    for key, value in values.items():
        section: Any = changed
        *parents, name = key.split(".")
        for parent in parents:
            setattr(section, parent, copy.copy(getattr(section, parent)))
            section = getattr(section, parent)
        setattr(section, name, value)
    return changed


def _candidates(config: RunConfig, layers: int, gpus: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """Iterate over shares of recomputed layers and values of the keys."""
    hosts, rest = divmod(gpus, GPUS_PER_HOST)
    processes = {NODES: hosts, PROCESSES: GPUS_PER_HOST} if hosts > 1 and not rest else {NODES: 1, PROCESSES: gpus}
    for tensor in divisors(gpus, GPUS_PER_HOST):
        for pipeline in divisors(gpus // tensor, layers):
            grid = {TP: tensor, PP: pipeline, SP: tensor > 1, DISTRIBUTED: True} | processes
            half = max(1, -(-layers // pipeline) // 2)
            for split in _splits(config):
                for recomputed, method in ((0.0, None), (0.5, "block"), (1.0, "uniform")):
                    number = {None: None, "block": half, "uniform": 1}[method]
                    again = {GRANULARITY: method and "full", METHOD: method, RECOMPUTED: number}
                    for micro in _micro_batches(config):
                        yield recomputed, grid | split | again | micro


def _splits(config: RunConfig) -> list[dict[str, Any]]:
    """Return the config's sizes of the first and last stage, which not every number of stages allows, and none."""
    even: dict[str, Any] = {FIRST_STAGE: None, LAST_STAGE: None}
    own = {key: get(config, key) for key in even}
    return [even] if own == even else [own, even]


def _micro_batches(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Iterate over the config's own size, and powers of two of the longest sequence up to `MOST_TOKENS`."""
    longest = config.runner.seq_length
    counts = [1]
    while 2 * counts[-1] * longest <= MOST_TOKENS:
        counts.append(2 * counts[-1])
    dynamic = get(config, DYNAMIC)
    own = filled(config.runner.max_tokens_per_mbs) if dynamic else config.actor.micro_batch_size
    for size in sorted({own, *(count * longest if dynamic else count for count in counts)}):
        yield {BUDGET if dynamic else MICRO: size}

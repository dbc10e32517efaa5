"""Layouts of one run on so many GPUs that pass the rules: who shares layers, what is recomputed, how much at a time."""

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
from mbridge_config.rules.parallel import FIRST_STAGE, LAST_STAGE, PP, SP, TP
from mbridge_config.rules.precision import GRANULARITY, METHOD, RECOMPUTED
from mbridge_config.schema.keys import filled, get
from mbridge_config.schema.kinds import RunConfig

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
    TP,
    PP,
    FIRST_STAGE,
    LAST_STAGE,
    SP,
    GRANULARITY,
    METHOD,
    RECOMPUTED,
    MICRO,
    BUDGET,
    DISTRIBUTED,
    NODES,
    PROCESSES,
)
"""What a layout may set. A rule that reads none of them says the same of all layouts."""


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class ProposedLayout:
    """One way to run on `plan.world_size` GPUs: the values of its keys, those that the config has not got already,
    and the plan with them.

    `recomputed` is the share of layers that are run again in the backward pass.
    """

    values: Mapping[str, Any]
    changes: Mapping[str, Any]
    plan: ParallelPlan
    recomputed: float
    tokens: int

    @property
    def peak(self) -> int:
        """Bytes on the rank that takes the most."""
        assert self.plan.peak is not None
        return self.plan.peak.peak

    @property
    def is_short(self) -> bool:
        """Whether the micro-batch is too small to keep a GPU busy, although there are more sequences."""
        return self.tokens < ENOUGH_TOKENS and self.plan.micro_batches_of_longest > 1

    @property
    def rank(self) -> tuple[Any, ...]:
        """Best first: least communication in layers, least pipeline, busy GPUs, least recomputation."""
        plan = self.plan
        wait = max(plan.pipeline_bubble, HIGH_BUBBLE)
        return (plan.tensor_parallel, plan.pipeline_parallel, wait, self.is_short, self.recomputed, -self.tokens)


def layouts(config: RunConfig, report: Report, gpus: int) -> list[ProposedLayout]:
    """All layouts on `gpus` GPUs that pass every rule on them, best first, whatever memory they take.

    Args:
        config: what to lay out.
        report: that of `check` on it, whose facts are used.
        gpus: ranks of the run.

    Raises:
        ConfigError: the model is not known, or its architecture is not counted.
    """
    facts = report.facts
    if facts is None or not can_count(facts):
        reason = "the model is not known" if facts is None else f"the parameters of {facts.model_type} are not counted"
        fix = "correct the errors above" if facts is None else "use a model of a family that the README names"
        problem = Problem(id="no-estimate", key=None, value=None, reason=f"{reason}, so nothing fits", fix=fix)
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
            tokens = plan.max_tokens_per_micro_batch
            changes = {key: value for key, value in values.items() if get(config, key) != value}
            found.append(
                ProposedLayout(values=values, changes=changes, plan=plan, recomputed=recomputed, tokens=tokens)
            )
    return sorted(found, key=lambda layout: layout.rank)


def other_errors(config: RunConfig, report: Report) -> list[Problem]:
    """The errors of `report` that no layout mends."""
    about = {rule.id for rule in rules_of(config) if set(rule.reads) & set(KEYS)}
    return [problem for problem in report.errors if problem.id not in about]


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A config that differs from `config` in these keys; what is the same is shared."""
    changed = copy.copy(config)
    copied: dict[str, Any] = {"": changed}
    for key, value in values.items():
        *parents, name = key.split(".")
        path = ""
        for parent in parents:
            inside = f"{path}.{parent}" if path else parent
            if inside not in copied:
                copied[inside] = copy.copy(getattr(copied[path], parent))
                setattr(copied[path], parent, copied[inside])
            path = inside
        setattr(copied[path], name, value)
    return changed


def _candidates(config: RunConfig, layers: int, gpus: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """Share of recomputed layers, and values of the keys."""
    hosts, rest = divmod(gpus, GPUS_PER_HOST)
    processes = {NODES: hosts, PROCESSES: GPUS_PER_HOST} if hosts > 1 and not rest else {NODES: 1, PROCESSES: gpus}
    for tensor in _divisors(gpus, GPUS_PER_HOST):
        for pipeline in _divisors(gpus // tensor, layers):
            grid = {TP: tensor, PP: pipeline, SP: tensor > 1, DISTRIBUTED: True} | processes
            half = max(1, -(-layers // pipeline) // 2)
            for split in _splits(config):
                for recomputed, method in ((0.0, None), (0.5, "block"), (1.0, "uniform")):
                    number = {None: None, "block": half, "uniform": 1}[method]
                    again = {GRANULARITY: method and "full", METHOD: method, RECOMPUTED: number}
                    for micro in _micro_batches(config):
                        yield recomputed, grid | split | again | micro


def _splits(config: RunConfig) -> list[dict[str, Any]]:
    """The config's own sizes of the first and last stage, which some numbers of stages do not allow, and none."""
    even: dict[str, Any] = {FIRST_STAGE: None, LAST_STAGE: None}
    own = {key: get(config, key) for key in even}
    return [even] if own == even else [own, even]


def _micro_batches(config: RunConfig) -> Iterator[dict[str, Any]]:
    """The config's own size, and powers of two of the longest sequence up to `MOST_TOKENS`."""
    longest = config.runner.seq_length
    counts = [1]
    while 2 * counts[-1] * longest <= MOST_TOKENS:
        counts.append(2 * counts[-1])
    dynamic = get(config, DYNAMIC)
    own = filled(config.runner.max_tokens_per_mbs) if dynamic else config.actor.micro_batch_size
    for size in sorted({own, *(count * longest if dynamic else count for count in counts)}):
        yield {BUDGET if dynamic else MICRO: size}


def _divisors(number: int, limit: int) -> list[int]:
    return [value for value in range(1, min(number, limit) + 1) if number % value == 0]

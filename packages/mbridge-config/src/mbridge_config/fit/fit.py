"""Find layouts that fit given GPUs, best first, and say why; tell whether a plan exceeds a GPU.

The best layout communicates least: it has the smallest tensor parallelism, then the smallest pipeline; then
micro-batches large enough to keep a GPU busy, then the least recomputation. Of the layouts with the same two sizes only
the best is shown.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mbridge_config.check import Report
from mbridge_config.fit.layouts import ENOUGH_TOKENS, ProposedLayout, layouts
from mbridge_config.plan.memory import GIB, USABLE, gib
from mbridge_config.problems import Problem, short
from mbridge_config.schema.run_kinds import RunConfig

SHOWN = 5
_LESS_OF = {
    "weights": "more GPUs, so that more of them share each layer",
    "gradients": "more GPUs, so that more of them share each layer",
    "optimizer": "more GPUs, over which the distributed optimizer divides it",
    "activations": "a smaller runner.seq_length",
    "logits": "a smaller runner.seq_length",
    "working": "a smaller runner.seq_length",
    "rollout weights": "a smaller model, since each rank generates with all of it",
    "generation": "a smaller rollout.max_running_requests",
}


_KEYS = {
    "weights": "actor.model.tensor_model_parallel_size",
    "gradients": "actor.model.tensor_model_parallel_size",
    "optimizer": "actor.optim.use_distributed_optimizer",
    "rollout weights": "rollout.model.model_path",
    "generation": "rollout.max_running_requests",
}


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Fit:
    """What `fit` found: layouts that fit, best first; where there are none, the one that takes the least memory.

    `memory` is that of a GPU, in bytes.
    """

    gpus: int
    memory: float
    fitting: tuple[ProposedLayout, ...]
    least: ProposedLayout | None

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON-ready values."""
        return {
            "gpus": self.gpus,
            "memory_gib": self.memory / GIB,
            "usable_share": USABLE,
            "fitting": [_layout_as_dict(layout) for layout in self.fitting],
            "least": None if self.least is None else _layout_as_dict(self.least),
        }

    def __str__(self) -> str:
        if self.fitting:
            blocks = [
                f"{number}. {title(layout)}\n"
                + "".join(f"   {reason}\n" for reason in reasons(layout))
                + f"   {as_arguments(layout.changes) or 'as it is'}\n"
                for number, layout in enumerate(self.fitting[:SHOWN], 1)
            ]
            more = len(self.fitting) - SHOWN
            return "\n".join(blocks) + (f"\n{more} more with --json\n" if more > 0 else "")
        if self.least is None:
            return f"no layout on {self.gpus} GPUs passes the rules; `mbridge-config check` says which fail\n"
        stage = self.least.plan.peak
        assert stage is not None
        return (
            f"nothing fits {self.gpus} GPUs of {self.memory / GIB:g} GiB ({USABLE:.0%} of which may be planned). "
            f"The least is {gib(self.least.peak)} a rank: {title(self.least)}\n"
            f"the largest term is {stage.largest}, {gib(stage.terms[stage.largest])}; what would help: "
            f"{_LESS_OF[stage.largest]}\n"
        )


def fit(config: RunConfig, report: Report, gpus: int, memory_gib: float) -> Fit:
    """Propose layouts of `config` on `gpus` GPUs of `memory_gib` GiB; `report` is that of `check` on it.

    Raises `ConfigError` if the model is unknown, or its parameters are not counted.
    """
    memory = memory_gib * GIB
    everything = layouts(config, report, gpus)
    best: dict[tuple[int, int], ProposedLayout] = {}
    for layout in everything:
        if layout.peak <= USABLE * memory:
            best.setdefault((layout.plan.tensor_parallel, layout.plan.pipeline_parallel), layout)
    least = None if best else min(everything, key=lambda layout: layout.peak, default=None)
    return Fit(gpus=gpus, memory=memory, fitting=tuple(best.values()), least=least)


def title(layout: ProposedLayout) -> str:
    """Return the layout in a line."""
    plan = layout.plan
    return f"tensor {plan.tensor_parallel} x pipeline {plan.pipeline_parallel} x data {plan.data_parallel}"


def reasons(layout: ProposedLayout) -> list[str]:
    """Return why the layout ranks where it does, and how much memory it takes."""
    plan, stage = layout.plan, layout.plan.peak
    assert stage is not None
    tensor = "whole layers on each GPU: no communication inside them"
    if plan.tensor_parallel > 1:
        tensor = f"each layer shared by {plan.tensor_parallel} GPUs, which communicate in it"
    pipeline = "no pipeline"
    if plan.pipeline_parallel > 1:
        pipeline = f"{plan.pipeline_parallel} stages, which wait {plan.pipeline_bubble:.1%} of a step"
    micro = f"micro-batches of up to {layout.tokens:,} tokens"
    if layout.is_short:
        micro += f", fewer than the {ENOUGH_TOKENS:,} that keep a GPU busy"
    again = plan.recompute
    if layout.recomputed:
        again += f": about {layout.recomputed / 3:.0%} more computation"  # a forward pass is a third of a step
    memory = f"about {gib(stage.peak)} a rank, most of it {stage.largest} ({gib(stage.terms[stage.largest])})"
    return [f"{tensor}; {pipeline}", f"{micro}; {again}", memory]


def as_arguments(values: Mapping[str, Any]) -> str:
    """Return `values` as arguments of the command line."""
    return " ".join(f"{key}={short(value)}" for key, value in values.items())


def _layout_as_dict(layout: ProposedLayout) -> dict[str, Any]:
    return {
        "values": dict(layout.values),
        "changes": dict(layout.changes),
        "reasons": reasons(layout),
        "plan": layout.plan.as_dict(),
    }


def memory_problems(config: RunConfig, report: Report, memory_gib: float) -> list[Problem]:
    """Return a problem if a rank needs more than `USABLE` of a GPU of `memory_gib` GiB; none if the plan is unknown.

    The fix is the fitting layout on the same number of ranks that changes the fewest keys.
    """
    plan = report.plan
    if plan is None or plan.peak is None or plan.peak.peak <= USABLE * memory_gib * GIB:
        return []
    found = fit(config, report, plan.world_size, memory_gib)
    if found.fitting:
        best = min(found.fitting, key=lambda layout: len(layout.changes))
        fix = f"set {as_arguments(best.changes)}: about {gib(best.peak)}"
    else:
        fix = str(found).strip().replace("\n", "; ")
    stage = plan.peak
    dynamic = config.runner.enable_dynamic_batch_size
    key = _KEYS.get(stage.largest, "runner.max_tokens_per_mbs" if dynamic else "actor.micro_batch_size")
    on_stage = f" on stage {stage.stage}" if len(plan.memory) > 1 else ""
    return [
        Problem(
            id="gpu-memory",
            reason=f"a rank{on_stage} takes about {gib(stage.peak)}, and {USABLE:.0%} of a GPU of {memory_gib:g} GiB "
            f"may be planned; the largest term is {stage.largest}, {gib(stage.terms[stage.largest])}",
            fix=fix,
            where=config.provenance.places.get(key),
        )
    ]

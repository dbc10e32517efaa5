"""Does the plan fit a GPU of a given size, and what to change where it does not?"""

from mbridge_config.check import Report
from mbridge_config.plan.fit import as_arguments, fit
from mbridge_config.plan.memory import GIB, USABLE
from mbridge_config.plan.text import gib
from mbridge_config.problems import Problem
from mbridge_config.run.kinds import RunConfig

_KEYS = {
    "weights": "actor.model.tensor_model_parallel_size",
    "gradients": "actor.model.tensor_model_parallel_size",
    "optimizer": "actor.optim.use_distributed_optimizer",
    "rollout weights": "rollout.model.model_path",
    "generation": "rollout.max_running_requests",
}


def memory_problems(config: RunConfig, report: Report, memory_gib: float) -> list[Problem]:
    """One problem if a rank needs more than `USABLE` of a GPU of `memory_gib` GiB; none if the plan is not known.

    The fix is the layout on as many ranks that changes fewest keys, of those that fit.
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
            key=None,
            value=None,
            reason=f"a rank{on_stage} takes about {gib(stage.peak)}, and {USABLE:.0%} of a GPU of {memory_gib:g} GiB "
            f"may be planned; the largest term is {stage.largest}, {gib(stage.terms[stage.largest])}",
            fix=fix,
            where=config.origin.where(key) if config.origin.was_set(key) else None,
        )
    ]

"""The plan as `mbridge-config check` prints it."""

from typing import TYPE_CHECKING

from mbridge_config.plan.memory import GIB, USABLE, StageMemory

if TYPE_CHECKING:
    from mbridge_config.plan.plan import ParallelPlan

_WIDTH = 19
_MEANING = {
    "gradients": "in fp32",
    "activations": "what layers keep for the backward pass",
    "logits": "or their gradient, in one place",
    "working": "recomputation, and gradients inside a layer",
    "rollout weights": "the model that generates, whole on each rank",
    "generation": "keys and values, sampling",
}


def gib(size: float) -> str:
    """Bytes as GiB, or as MiB where that is less than a tenth of one."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def plan_text(plan: "ParallelPlan", memory_gib: float | None = None) -> str:
    """The lines of a plan; with `memory_gib`, beside a GPU of that size."""
    lines = [*_model(plan), *_ranks(plan), *_batches(plan), *_memory(plan, memory_gib)]
    return "".join(f"{label:<{_WIDTH}}{text}\n" for label, text in lines)


def _model(plan: "ParallelPlan") -> list[tuple[str, str]]:
    if plan.parameters is None:
        return []
    text = f"{plan.parameters:,} parameters"
    if plan.active_parameters != plan.parameters:
        text += f", {plan.active_parameters:,} active"
    if plan.vision_parameters:
        text += f", {plan.vision_parameters:,} in the vision tower and its projection"
    return [("model", text)]


def _ranks(plan: "ParallelPlan") -> list[tuple[str, str]]:
    grid = f"{plan.world_size} = tensor {plan.tensor_parallel} x pipeline {plan.pipeline_parallel} "
    grid += f"x data {plan.data_parallel} x context {plan.context_parallel}, expert {plan.expert_parallel}"
    sizes = "unknown" if plan.layers_per_stage is None else ", ".join(map(str, plan.layers_per_stage))
    stages = [(f"stage {number}", str(stage)) for number, stage in enumerate(plan.stages)]
    return [("ranks", grid), ("layers by stage", sizes), *stages]


def _batches(plan: "ParallelPlan") -> list[tuple[str, str]]:
    steps = plan.optimizer_steps_per_step
    of_longest = f"{plan.micro_batches_of_longest} on each data-parallel rank if all sequences are the longest"
    micro = f"up to {plan.max_tokens_per_micro_batch:,} tokens each, {of_longest}"
    if plan.micro_batches is not None:
        micro = f"{plan.micro_batches} of {plan.micro_batch_size} on each data-parallel rank"
    if plan.max_patches_per_micro_batch:
        micro += f"; at most {plan.max_patches_per_micro_batch:,} patches of images in one"
    bubble = "none, with one stage"
    if plan.pipeline_parallel > 1:
        more = "" if plan.micro_batches is not None else ", more where sequences are shorter"
        alike = " if all stages take equally long" if len(set(plan.layers_per_stage or ())) > 1 else ""
        bubble = f"{plan.pipeline_bubble:.1%} of a step{alike}{more}"
    return [
        (
            "sequences a step",
            f"{plan.sequences_per_step} in {steps} optimizer step{'' if steps == 1 else 's'} "
            f"of {plan.global_batch_size}",
        ),
        ("tokens a step", f"at most {plan.max_tokens_per_step:,}"),
        ("micro-batches", micro),
        ("pipeline bubble", bubble),
    ]


def _memory(plan: "ParallelPlan", memory_gib: float | None) -> list[tuple[str, str]]:
    peak = plan.peak
    if peak is None:
        reason = "the model is not known" if plan.layers_per_stage is None else "this architecture is not counted"
        return [("memory a rank", f"not estimated: {reason}")]
    stage = f" on stage {peak.stage}" if len(plan.memory) > 1 else ""
    of = "" if memory_gib is None else f" of {memory_gib:g} GiB, {USABLE:.0%} of which may be planned"
    layers = {"te": "Transformer Engine", "torch": "plain torch", "auto": "layers of plain torch at most"}[plan.backend]
    lines = [
        ("memory a rank", f"about {gib(peak.peak)}{stage}{of} ({plan.precision}, {layers}, {plan.recompute})"),
        *((f"  {name}", _term(name, peak, plan.precision)) for name in peak.terms),
    ]
    if peak.generation:
        training, generation = (sum(peak.moments[turn].values()) for turn in ("training", "generation"))
        lines.append(("  by turns", f"{gib(training)} in training, {gib(generation)} in generation"))
    if len(plan.memory) > 1:
        lines.append(("  by stage", ", ".join(gib(stage.peak) for stage in plan.memory)))
    if peak.reference_on_host:
        lines.append(("  in host memory", f"{gib(peak.reference_on_host)}: weights of the reference policy"))
    return lines


def _term(name: str, stage: StageMemory, precision: str) -> str:
    optimizer = "moments in fp32" if precision == "fp32" else "master weights and moments in fp32"
    meaning = (_MEANING | {"optimizer": optimizer}).get(name)
    notes = [meaning] if meaning else []
    if name == stage.largest:
        notes.append("the largest")
    return f"{gib(stage.terms[name]):>10}" + (f"  {'; '.join(notes)}" if notes else "")

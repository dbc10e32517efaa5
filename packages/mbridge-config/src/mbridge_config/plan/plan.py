"""Plan how a run shares ranks, layers and sequences, and what a rank holds; print the plan. No torch."""

import contextlib
import dataclasses
from typing import Any

from mbridge_config.facts.model import HFFacts
from mbridge_config.plan.memory import USABLE, StageMemory, estimate_memory, gib
from mbridge_config.plan.parameters import can_count, count_active_parameters, count_parameters, count_vision_parameters
from mbridge_config.plan.stages import Stage, make_stages, planned_sizes
from mbridge_config.plan.training_setup import training_setup
from mbridge_config.schema.sft import SFTConfig

_WIDTH = 19
_MEANING = {
    "gradients": "in fp32",
    "activations": "what layers keep for the backward pass",
    "logits": "or their gradient, in one place",
    "working": "recomputation, and gradients inside a layer",
    "rollout weights": "the model that generates, whole on each rank",
    "generation": "keys and values, sampling",
}


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class ParallelPlan:
    """Ranks are numbered with tensor parallelism fastest, then data, then pipeline, as Megatron-Core does.

    Sizes of memory are in bytes. What depends on the model is None or empty where that is not known, and parameters
    and memory also where its architecture is not.
    """

    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    context_parallel: int
    expert_parallel: int
    layers_per_stage: tuple[int, ...] | None
    stages: tuple[Stage, ...]
    parameters: int | None
    active_parameters: int | None  # without the experts that one token is not sent to
    vision_parameters: int | None
    sequences_per_step: int
    optimizer_steps_per_step: int
    global_batch_size: int
    micro_batch_size: int
    micro_batches: int | None  # of one data-parallel rank in one optimizer step; None: by tokens
    micro_batches_of_longest: int  # the same if all sequences are as long as allowed
    max_tokens_per_micro_batch: int
    max_patches_per_micro_batch: int  # of images, if each token is one's; what the memory is estimated for
    max_tokens_per_step: int
    pipeline_bubble: float  # with micro_batches_of_longest, if all stages take equally long
    precision: str
    backend: str
    recompute: str
    memory: tuple[StageMemory, ...]

    @property
    def peak(self) -> StageMemory | None:
        """Return the stage that takes the most memory."""
        return max(self.memory, key=lambda stage: stage.peak, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON-ready values, with the sums."""
        values = dataclasses.asdict(self)
        for stage, found in zip(values["memory"], self.memory, strict=True):
            stage |= {"peak": found.peak, "largest": found.largest}
        return values

    def __str__(self) -> str:
        return plan_text(self)


def pipeline_bubble(stages: int, micro_batches: int) -> float:
    """Return the share of a step in which a stage waits, (p - 1) / (m + p - 1) for p stages and m micro-batches.

    Filling and draining the pipeline take p - 1 times the time of a micro-batch beside the m that are needed
    (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2.1, which gives it as a share of the ideal time, (p - 1) / m). All stages are assumed to take equally
    long, which is the purpose of uneven stage sizes.
    """
    return (stages - 1) / (micro_batches + stages - 1)


def make_plan(config: Any, facts: HFFacts | None, world_size: int) -> ParallelPlan | None:
    """Return the plan of `config` on `world_size` ranks; None if layers, ranks or batches cannot be shared evenly."""
    actor, model, runner = config.actor, config.actor.model, config.runner
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    sizes = None if facts is None else planned_sizes(model, facts)
    if world_size % (tensor * pipeline) or (facts is not None and sizes is None):
        return None
    data = world_size // (tensor * pipeline)
    sequences = actor.global_batch_size
    if not isinstance(config, SFTConfig):
        sequences = config.data.rollout_batch_size * config.algorithm.group_size
    dynamic = runner.enable_dynamic_batch_size
    if sequences % actor.global_batch_size or (
        not dynamic and actor.global_batch_size % (data * actor.micro_batch_size)
    ):
        return None
    together = max(1, runner.max_tokens_per_mbs // runner.seq_length) if dynamic else actor.micro_batch_size
    micro_batches = -(-actor.global_batch_size // (data * together))
    known = facts if facts is not None and can_count(facts) else None
    memory: tuple[StageMemory, ...] = ()
    patches = 0
    if known and sizes is not None:
        setup = training_setup(config, known, sizes, data, world_size, micro_batches)
        patches = setup.micro_batch.patches
        with contextlib.suppress(OverflowError):  # a length beyond all reason
            memory = estimate_memory(setup)
    return ParallelPlan(
        world_size=world_size,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=data,
        context_parallel=model.context_parallel_size,
        expert_parallel=model.expert_model_parallel_size,
        layers_per_stage=sizes,
        stages=make_stages(sizes, facts) if sizes is not None and facts is not None else (),
        parameters=count_parameters(known) if known else None,
        active_parameters=count_active_parameters(known) if known else None,
        vision_parameters=count_vision_parameters(known) if known else None,
        sequences_per_step=sequences,
        optimizer_steps_per_step=sequences // actor.global_batch_size,
        global_batch_size=actor.global_batch_size,
        micro_batch_size=actor.micro_batch_size,
        micro_batches=None if dynamic else micro_batches,
        micro_batches_of_longest=micro_batches,
        max_tokens_per_micro_batch=runner.max_tokens_per_mbs if dynamic else runner.seq_length * actor.micro_batch_size,
        max_patches_per_micro_batch=patches,
        max_tokens_per_step=sequences * runner.seq_length,
        pipeline_bubble=pipeline_bubble(pipeline, micro_batches),
        precision=model.precision,
        backend=model.backend,
        recompute=describe_recompute(model),
        memory=memory,
    )


def describe_recompute(model: Any) -> str:
    """Return in words what the backward pass recomputes."""
    number = model.recompute_num_layers or 1
    if model.recompute_granularity == "full" and model.recompute_method == "block":
        return f"the first {number} layer{'s' if number > 1 else ''} of each stage recomputed"
    if model.recompute_granularity == "full":
        return "all layers recomputed" + (f", {number} at a time" if number > 1 else "")
    return "attention recomputed" if model.recompute_granularity == "selective" else "nothing recomputed"


def plan_text(plan: ParallelPlan, memory_gib: float | None = None) -> str:
    """Return the lines of a plan; with `memory_gib`, compared with a GPU of that size."""
    lines = [*_model(plan), *_ranks(plan), *_batches(plan), *_memory(plan, memory_gib)]
    return "".join(f"{label:<{_WIDTH}}{text}\n" for label, text in lines)


def _model(plan: ParallelPlan) -> list[tuple[str, str]]:
    if plan.parameters is None:
        return []
    text = f"{plan.parameters:,} parameters"
    if plan.active_parameters != plan.parameters:
        text += f", {plan.active_parameters:,} active"
    if plan.vision_parameters:
        text += f", {plan.vision_parameters:,} in the vision tower and its projection"
    return [("model", text)]


def _ranks(plan: ParallelPlan) -> list[tuple[str, str]]:
    grid = f"{plan.world_size} = tensor {plan.tensor_parallel} x pipeline {plan.pipeline_parallel} "
    grid += f"x data {plan.data_parallel} x context {plan.context_parallel}, expert {plan.expert_parallel}"
    sizes = "unknown" if plan.layers_per_stage is None else ", ".join(map(str, plan.layers_per_stage))
    stages = [(f"stage {number}", str(stage)) for number, stage in enumerate(plan.stages)]
    return [("ranks", grid), ("layers by stage", sizes), *stages]


def _batches(plan: ParallelPlan) -> list[tuple[str, str]]:
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


def _memory(plan: ParallelPlan, memory_gib: float | None) -> list[tuple[str, str]]:
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

"""Estimate the GPU memory of one rank, term by term, as the training engine allocates it.

Per trained parameter: the weight; its gradient in fp32 (Megatron-Core's buffer); in half precision a master weight in
fp32; and Adam's two moments in fp32. The distributed optimizer divides master weights and moments over the
data-parallel ranks (ZeRO stage 1: Rajbhandari et al. 2020). In half precision that is 2 + 4 + 12 / data-parallel bytes.

Activations are what `activations` says of each layer, for as many micro-batches as a stage has between forward and
backward pass: under one-forward-one-backward the stage s of p holds p - s of them (Narayanan et al. 2021, section
2.2.1). The peak is either at the loss, where the last stage also holds the logits, whose gradient takes their place, or
in a backward pass that recomputes: a group of layers in full.

Not counted: the CUDA context, communication buffers and memory that the allocator cannot use; `USABLE` leaves room.
"""

import dataclasses

from mbridge_config.facts.model import HFFacts
from mbridge_config.plan import activations
from mbridge_config.plan.activations import Kernels
from mbridge_config.plan.parameters import (
    Size,
    count_parameters,
    embedding,
    final_norm,
    has_experts,
    language_layer,
    vision_projection,
    vision_tower,
)

GIB = 2**30
USABLE = 0.9
"""Share of a GPU's memory that an estimate may take; the rest is for what is not counted."""

_CHUNK_LOGITS = 2**28
"""The loss works on so many logits at a time, in a kernel that keeps nothing but a copy of them."""


def gib(size: float) -> str:
    """Return bytes as text in GiB, or in MiB below a tenth of a GiB."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class MicroBatch:
    """The largest micro-batch of one rank: tokens, padding included, and patches of images."""

    tokens: int
    patches: int = 0


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Recompute:
    """Layers of each stage that are run again in the backward pass, and how many at a time."""

    layers: int | None = None  # of each stage, the first ones; None: all
    group: int = 1


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Generation:
    """The largest batch of sequences that one rank generates at once, on weights of its own."""

    sequences: int
    prompt_tokens: int
    tokens: int


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Training:
    """All that the estimate looks at. `micro_batches` are those of one rank in an optimizer step, or as few as
    there may be; `recompute` is None where nothing is recomputed."""

    facts: HFFacts
    stage_sizes: tuple[int, ...]
    kernels: Kernels
    micro_batch: MicroBatch
    micro_batches: int
    data_parallel: int = 1
    distributed_optimizer: bool = True
    recompute: Recompute | None = None
    trains_language: bool = True
    trains_tower: bool = True
    trains_projection: bool = True
    generation: Generation | None = None
    keeps_reference: bool = False
    offloads: tuple[str, ...] = ()  # of "weights", "gradients", "optimizer": what sampling finds off the GPU


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage.

    `working` is what a recomputing backward pass needs beyond the peak at the loss. Generation and training take
    turns: `generation` (cache of keys and values, sampling) takes the place of activations, logits and working, and
    what is offloaded is not there then; with "weights", the sampler's are not there in training. Between the two the
    one's weights are copied to the other's. `reference_on_host` is not on the GPU.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    rollout_weights: int = 0
    generation: int = 0
    reference_on_host: int = 0
    offloads: tuple[str, ...] = ()

    @property
    def terms(self) -> dict[str, int]:
        """Return the terms at the peak by name."""
        largest = max(self.moments.values(), key=lambda terms: sum(terms.values()))
        return {name: value for name, value in largest.items() if value}

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """Return the terms in training, in generation, and while weights are copied between the two."""
        policy = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        sampler = {"rollout weights": self.rollout_weights}
        training = policy | ({} if "weights" in self.offloads else sampler)
        training |= {"activations": self.activations, "logits": self.logits, "working": self.working}
        staying = {name: value for name, value in policy.items() if name not in self.offloads}
        sampling = staying | sampler | {"generation": self.generation}
        copying = {"weights": self.weights} | staying | sampler
        if not self.rollout_weights:
            return {"training": training}
        return {"training": training, "generation": sampling, "copying": copying}

    @property
    def peak(self) -> int:
        """Return the sum of all terms."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """Return the name of the largest term."""
        terms = self.terms
        return max(terms, key=lambda name: terms[name])


def estimate_memory(training: Training) -> tuple[StageMemory, ...]:
    """Return the memory of each pipeline stage. The architecture must be known (`parameters.can_count`)."""
    return tuple(_stage(training, stage) for stage in range(len(training.stage_sizes)))


def _stage(training: Training, stage: int) -> StageMemory:
    held, trained = _parameters(training, stage)
    e = training.kernels.number_bytes
    optimizer_bytes = 8 if e == 4 else 12
    shares = training.data_parallel if training.distributed_optimizer else 1
    stored, logits, working = _activations(training, stage)
    generation = training.generation
    return StageMemory(
        stage=stage,
        parameters=held,
        weights=e * held,
        gradients=4 * trained,
        optimizer=-(-optimizer_bytes * trained // shares),
        activations=round(stored),
        logits=round(logits),
        working=round(working),
        rollout_weights=e * (count_parameters(training.facts) or 0) if generation else 0,
        generation=_generation_bytes(training.facts, e, generation) if generation else 0,
        reference_on_host=e * held if training.keeps_reference else 0,
        offloads=training.offloads,
    )


def _numbers(training: Training, stage: int) -> range:
    first = sum(training.stage_sizes[:stage])
    return range(first, first + training.stage_sizes[stage])


def _parameters(training: Training, stage: int) -> tuple[int, int]:
    """Parameters on one rank of the stage, and those of them that are trained."""
    facts, tensor = training.facts, training.kernels.tensor_parallel
    is_first, is_last = stage == 0, stage == len(training.stage_sizes) - 1
    language = sum((language_layer(facts, number) for number in _numbers(training, stage)), Size())
    if is_first:
        language += embedding(facts, padded_for=tensor)
    if is_last:
        language += final_norm(facts)
        if not (facts.tied_embeddings and is_first):  # a last stage of its own has a copy of tied embeddings
            language += embedding(facts, padded_for=tensor)
    parts = [(language, training.trains_language)]
    if is_first and facts.vision is not None:
        parts.append((vision_tower(facts.vision), training.trains_tower))
        parts.append((vision_projection(facts.vision), training.trains_projection))
    sizes = [(size.on_rank(tensor), is_trained) for size, is_trained in parts]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _activations(training: Training, stage: int) -> tuple[float, float, float]:
    """Bytes kept at the loss, of the logits there, and of what a later moment needs beyond these two."""
    facts, kernels, tokens = training.facts, training.kernels, training.micro_batch.tokens
    is_first, is_last = stage == 0, stage == len(training.stage_sizes) - 1
    language, tower = _language_bytes(training, stage) * tokens, 0.0
    if is_first and facts.vision is not None:
        tower = _tower_bytes(training) * training.micro_batch.patches
        language += activations.deepstack_bytes(facts, kernels) * tokens if training.micro_batch.patches else 0
    if is_last:
        language += activations.final_norm_bytes(facts, kernels) * tokens
    in_flight = min(len(training.stage_sizes) - stage, training.micro_batches)
    stored = in_flight * (language + tower)
    logits = _logits_bytes(training) if is_last else 0.0
    peaks = [stored + _layer_backward_bytes(training, stage)]
    if training.recompute is not None and is_first and facts.vision is not None:
        # The language model's part of this micro-batch is gone when the tower's turn comes.
        again = activations.vision_layer_bytes(facts.vision, kernels) * training.micro_batch.patches
        peaks.append(stored - language + again)
    return stored, logits, max(0.0, max(peaks) - stored - logits)


def _language_bytes(training: Training, stage: int) -> float:
    """Bytes a token that the stage's layers keep."""
    facts, kernels, recompute = training.facts, training.kernels, training.recompute
    numbers = _numbers(training, stage)
    again = 0 if recompute is None else len(numbers) if recompute.layers is None else recompute.layers
    again = min(again, len(numbers))
    groups = -(-again // recompute.group) if recompute is not None else 0
    inputs = groups * activations.layer_input_bytes(facts, kernels)
    return inputs + sum(activations.language_layer_bytes(facts, number, kernels) for number in numbers[again:])


def _tower_bytes(training: Training) -> float:
    """Bytes a patch that the vision tower keeps. Recomputation, of whatever extent, holds for each of its layers."""
    vision, kernels = training.facts.vision, training.kernels
    assert vision is not None
    kept = activations.vision_ends_bytes(vision, kernels)
    if not training.trains_tower:
        return kept if training.trains_projection else 0.0
    layer = activations.vision_layer_bytes if training.recompute is None else activations.vision_layer_input_bytes
    return kept + vision.depth * layer(vision, kernels)


def _layer_backward_bytes(training: Training, stage: int) -> float:
    """Bytes of one group of recomputed layers, and of the gradients of the MLP's tensors inside a layer. Those of
    weights are added to the fp32 buffer by the product that makes them."""
    facts, kernels, tokens = training.facts, training.kernels, training.micro_batch.tokens
    number = _numbers(training, stage)[-1]
    if has_experts(facts, number):
        width, copies = facts.expert_ffn_hidden_size or 0, facts.experts_per_token or 0
    else:
        width, copies = facts.ffn_hidden_size or 0, 1
    inside = copies * kernels.number_bytes * (facts.hidden_size + 3 * width / kernels.tensor_parallel) * tokens
    group = 0 if training.recompute is None else training.recompute.group
    return group * activations.language_layer_bytes(facts, number, kernels) * tokens + inside


def _logits_bytes(training: Training) -> float:
    """Logits, and a copy of as many as the loss takes at a time."""
    facts, kernels = training.facts, training.kernels
    weights = embedding(facts, padded_for=kernels.tensor_parallel).on_rank(kernels.tensor_parallel)
    logits = training.micro_batch.tokens * weights // facts.hidden_size
    return kernels.number_bytes * float(logits + min(logits, _CHUNK_LOGITS))


def _generation_bytes(facts: HFFacts, e: int, generation: Generation) -> int:
    """Keys and values of all layers at full length and the numbers that sampling sorts and sums; or those of the
    prompts, and a layer's MLP over all of them at once. An estimate that no measurement stands behind yet."""
    rows = generation.sequences
    cache = rows * facts.num_layers * 2 * facts.num_query_groups * facts.head_dim * e  # a token
    sampling = rows * (facts.vocab_size or 0) * (e + 32)
    mlp = rows * generation.prompt_tokens * e * 4 * ((facts.ffn_hidden_size or 0) + facts.hidden_size)
    return round(float(max(cache * generation.tokens + sampling, cache * generation.prompt_tokens + mlp)))

"""Faults of Megatron-Bridge in these models: each test shows the fault first, then the correct result here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang, WorkerPool
from testing.tiny_models import VOCAB_SIZE, make_vision_model
from testing.vision_samples import write_reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("upstream")

    @cache
    def make(family: str) -> Path:
        directory = root / family
        write_reference(make_vision_model(family, False, directory), directory, frames_are_runs=family != "qwen2_5_vl")
        return directory

    return make


def largest_difference(model: list[torch.nn.Module], directory: Path) -> float:
    """Between the logits of a packed batch and transformers'."""
    from mbridge_model import MropeSettings

    from testing.vision_forward import packed_batch, run

    samples = list(torch.load(directory.with_suffix(".pt"), weights_only=True).values())
    batch, starts = packed_batch(samples, MropeSettings.from_directory(directory), 1)
    logits = run(model, batch, starts, [len(sample["tokens"]) for sample in samples], VOCAB_SIZE, backward=False)
    assert logits is not None
    return max((ours - sample["logits"]).abs().max().item() for ours, sample in zip(logits, samples, strict=True))


def merger_activation(directory: Path) -> tuple[float, float]:
    from mbridge_model import load

    model, _ = load(directory)
    right = largest_difference(model, directory)
    tower: Any = model[0].vision_model
    for merger in (tower.merger, *tower.decoder.deepstack_merger_list):
        merger.activation_func = tower.config.activation_func  # as Megatron-Bridge builds it
    return right, largest_difference(model, directory)


def test_mergers_have_the_exact_gelu(worker_pool: WorkerPool, reference: Callable[[str], Path]) -> None:
    ((right, upstream),) = Gang(1, worker_pool).run(merger_activation, reference("qwen3_vl"))
    assert upstream > 1e-4
    assert right <= 1e-5


def mrope_section(directory: Path) -> tuple[list[int], list[int], float, float]:
    from mbridge_model import load
    from mbridge_model.bridge.bridge import Bridge

    model, handle = load(directory)
    right = largest_difference(model, directory)
    model[0].language_model.mrope_section = [4, 2, 2]
    upstream = Bridge(handle.directory).provider().mrope_section
    return upstream, handle.config.mrope_section, right, largest_difference(model, directory)


def test_sections_come_from_the_config(worker_pool: WorkerPool, reference: Callable[[str], Path]) -> None:
    ((upstream, ours, right, wrong),) = Gang(1, worker_pool).run(mrope_section, reference("qwen2_5_vl"))
    assert upstream == [16, 24, 24]
    assert ours == [2, 3, 3]
    assert wrong > 1e-3
    assert right <= 1e-5


def features_gradient() -> tuple[list[list[float]], list[list[float]]]:
    """Of one deepstack feature's split over two sequence-parallel ranks: Megatron-Bridge's, and ours."""
    from mbridge_model import enable_cpu
    from mbridge_model.bridge.bridge import qwen_vl_parts
    from mbridge_model.parallel import initialize_parallel
    from mbridge_model.vision.deepstack import place_features
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    enable_cpu()
    initialize_parallel(Parallel(tensor=2, sequence=True), seed=1)
    qwen_vl_parts()
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.utils import split_deepstack_embs

    rank = torch.distributed.get_rank()
    mask = torch.tensor([[True, True, False, True]])  # rank 0 has the first two positions
    features = torch.ones(3, 2, requires_grad=True)
    _, (own,) = split_deepstack_embs(mask, [features], tp_size=2, tp_rank=rank, sequence_parallel=True)
    own.sum().backward()
    assert features.grad is not None
    upstream = features.grad.tolist()
    features.grad = None
    wide = place_features(torch.zeros(4, 1, 2), mask, features.detach(), [features])
    scatter_to_sequence_parallel_region(wide).sum().backward()
    assert features.grad is not None
    return upstream, features.grad.tolist()


def test_sequence_parallel_features_have_whole_gradients(gang2: Gang) -> None:
    """Each rank holds a copy of the tower's replicated weights, and so needs the gradient of every feature."""
    (upstream_0, ours_0), (upstream_1, ours_1) = gang2.run(features_gradient)
    assert upstream_0 == [[1, 1], [1, 1], [0, 0]]
    assert upstream_1 == [[0, 0], [0, 0], [1, 1]]
    assert ours_0 == ours_1 == [[1, 1]] * 3


def first_stage_of_one_layer() -> str:
    from mbridge_model.bridge.bridge import qwen_vl_parts

    qwen_vl_parts()
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.transformer_block import Qwen3VLTransformerBlock

    stage: Any = SimpleNamespace(pre_process=True, layers=[None])
    try:
        Qwen3VLTransformerBlock.forward(stage, torch.zeros(1), None, deepstack_visual_embeds=[torch.zeros(1)] * 3)
    except AssertionError as error:
        return str(error)
    return "accepted"


def test_megatron_bridge_wants_all_features_on_the_first_stage(worker_pool: WorkerPool) -> None:
    """Ours works with one layer there: `test_vision_parity`, at PP 4."""
    assert Gang(1, worker_pool).run(first_stage_of_one_layer) == [
        "the deepstack_visual_embeds should on the first pp-stage"
    ]


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def tower_gradients(directory: Path, overrides: dict[str, Any], with_upstream: bool) -> dict[str, float]:
    """Norm of the gradient of each parameter of the tower."""
    from mbridge_model import MropeSettings, load

    from testing.vision_forward import packed_batch, run

    model, _ = load(directory, overrides=overrides)
    tower: Any = model[0].get_submodule(model[0].vision.tower)
    if with_upstream:
        del tower.decoder._checkpointed_forward
    samples = [torch.load(directory.with_suffix(".pt"), weights_only=True)["images of several sizes"]]
    batch, starts = packed_batch(samples, MropeSettings.from_directory(directory), 1)
    run(model, batch, starts, [len(samples[0]["tokens"])], VOCAB_SIZE, backward=True)
    return {
        name: 0.0 if parameter.grad is None else parameter.grad.norm().item()
        for name, parameter in tower.named_parameters()
    }


def test_recomputation_keeps_the_features_gradients(worker_pool: WorkerPool, reference: Callable[[str], Path]) -> None:
    directory = reference("qwen3_vl")
    upstream, ours, stored = (
        Gang(1, worker_pool).run(tower_gradients, directory, overrides, with_upstream)[0]
        for overrides, with_upstream in ((RECOMPUTE, True), (RECOMPUTE, False), ({}, False))
    )
    mergers = [name for name in ours if "deepstack_merger_list" in name]
    assert len(mergers) == 18
    assert all(upstream[name] == 0.0 for name in mergers)
    assert ours == pytest.approx(stored, rel=1e-5)
    assert all(gradient > 0.0 for gradient in stored.values())


def test_recomputation_of_transformers_tower(worker_pool: WorkerPool, reference: Callable[[str], Path]) -> None:
    recomputed, stored = (
        Gang(1, worker_pool).run(tower_gradients, reference("qwen2_5_vl"), overrides, False)[0]
        for overrides in (RECOMPUTE, {})
    )
    assert recomputed == pytest.approx(stored, rel=1e-5)
    assert all(gradient > 0.0 for gradient in stored.values())


def vision_frequencies(directory: Path) -> tuple[str, str, list[float]]:
    from mbridge_model import load
    from megatron.core.utils import unwrap_model

    model, _ = load(directory, dtype=torch.bfloat16)
    tower: Any = unwrap_model(model[0]).visual
    frequencies = tower.rotary_pos_emb.frequencies
    return str(tower.patch_embed.proj.weight.dtype), str(frequencies.dtype), frequencies.tolist()


def test_frequencies_stay_fp32_in_half_precision(worker_pool: WorkerPool, reference: Callable[[str], Path]) -> None:
    """As a buffer they would be rounded with the weights."""
    ((weights, dtype, frequencies),) = Gang(1, worker_pool).run(vision_frequencies, reference("qwen2_5_vl"))
    assert (weights, dtype) == ("torch.bfloat16", "torch.float32")
    exact = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(torch.tensor(frequencies), exact, rtol=1e-6, atol=0)
    assert (exact.bfloat16().float() / exact - 1).abs().max() > 1e-4

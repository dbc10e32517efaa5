"""Whole runs of the app: their files, and resuming as if the run had not been stopped."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from mbridge_config import HFFacts
from mbridge_config.plan.flops import forward_flops
from mbridge_reasoning.metrics import TIME_SPLIT
from transformers import AutoModelForCausalLM, AutoTokenizer

from testing.app_runs import assert_same_state, execute, leaves, metrics, saved

PROGRAM = Path(__file__).parent / "reasoning_run_program.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the directory of the program's runs, and their output."""
    directory = tmp_path_factory.mktemp("runs")
    return directory, execute(str(PROGRAM), str(directory))


def test_resumed_run_has_the_metrics_of_the_unbroken_one(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    unbroken = metrics(directory / "unbroken")
    assert list(unbroken) == [0, 1, 2, 3, 4]
    assert unbroken[4]["policy/kl"] > 0  # the policy has moved away from the reference
    assert len({unbroken[step]["train/response_length"] for step in (1, 2, 3, 4)}) > 1
    assert metrics(directory / "stopped") == unbroken
    assert metrics(directory / "elsewhere") == {step: unbroken[step] for step in (3, 4)}


@pytest.mark.parametrize("run", ["stopped", "elsewhere"])
@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_resumed_run_has_the_state_of_the_unbroken_one(runs: tuple[Path, str], run: str, file: str) -> None:
    directory, _ = runs
    expected = saved(directory / "unbroken", 4, file)
    tensors = [value for _, value in leaves(expected) if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) > 100_000
    assert_same_state(saved(directory / run, 4, file), expected)


def test_training_changes_the_weights(runs: tuple[Path, str]) -> None:
    """Otherwise the comparisons above would also hold for runs that do nothing."""
    directory, _ = runs
    before, after = (saved(directory / "unbroken", step, "model_optim_rng.pt")["model"] for step in (2, 4))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_checkpoint_opens_with_transformers(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    hf_directory = directory / "unbroken" / "checkpoints" / "global_step_4" / "actor" / "hf_model"
    exported = AutoModelForCausalLM.from_pretrained(hf_directory).state_dict()
    megatron = saved(directory / "unbroken", 4, "model_optim_rng.pt")["model"]
    same = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.layers.1.mlp.down_proj.weight": "decoder.layers.1.mlp.linear_fc2.weight",
        "model.layers.0.self_attn.o_proj.weight": "decoder.layers.0.self_attention.linear_proj.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    for name, megatron_name in same.items():
        assert torch.equal(exported[name], megatron[megatron_name]), name
    tokenizer = AutoTokenizer.from_pretrained(hf_directory)
    assert tokenizer.decode(tokenizer("3 + 4 = 7")["input_ids"]) == "3 + 4 = 7"


@pytest.mark.parametrize("run", ["from-hf", "from-megatron"])
def test_a_checkpoint_starts_another_run(runs: tuple[Path, str], run: str) -> None:
    directory, _ = runs
    last = metrics(directory / "unbroken")[4]
    expected = {name: value for name, value in last.items() if name.startswith("validation/")}
    started = metrics(directory / run)
    assert expected and {name: started[0][name] for name in expected} == expected
    assert started[1]["policy/grad_norm"] > 0


def test_a_run_leaves_its_report_and_the_command_that_resumes_it(runs: tuple[Path, str]) -> None:
    directory, printed = runs
    report = (directory / "unbroken" / "report.html").read_text()
    assert "<svg" in report and "Train/rollout mismatch" in report
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", report)
    first_run = printed.split("---")[1]
    assert f"{directory}/unbroken/report.html" in first_run
    command = next(line for line in first_run.splitlines() if line.startswith("to go on"))
    assert "runner.experiment_name=unbroken" in command and "runner.resume_dir=auto" in command
    names = [word.partition("=")[0] for word in command.split() if "=" in word]
    assert len(names) == len(set(names)), "a key is set twice"


def test_profiled_step_leaves_a_trace_with_its_phases(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    (profiler,) = directory.rglob("profiler")
    (file,) = profiler.iterdir()
    assert file == directory / "from-hf" / "profiler" / "chrome_trace_rank0_step1.json.gz"
    names = {event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"step 1", "generate", "reward", "logprobs", "reference", "train", "optimizer_step"} <= names


def test_operations_are_counted(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    records = [json.loads(line) for line in (directory / "unbroken" / "metrics.jsonl").read_text().splitlines()]
    facts = HFFacts.load(directory / "model")
    for record in records[1:]:
        operations = record["tflops_per_second"] * record["time/train"] * 1e12
        # Attention of these short answers is a small part, so the mean length will do.
        length = record["tokens"] / 24
        expected = forward_flops(facts, [round(length)] * 24)
        assert expected is not None
        assert operations == pytest.approx(expected.training(), rel=0.03)


def test_mismatch_of_trainer_and_rollout_is_rounding(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    for step, record in metrics(directory / "unbroken").items():
        assert step == 0 or record["mismatch/logprob_max_abs"] < 1e-4


def test_second_quickstart_gets_a_name_of_its_own(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    assert list(metrics(directory / "unbroken-2")) == [0, 1]
    assert list(metrics(directory / "unbroken")) == [0, 1, 2, 3, 4]


MISTAKES = {
    "prompt": r"long\.jsonl:2: the prompt has \d+ tokens, data\.max_prompt_length allows 8; raise",
    "damaged": r"/iter_0000004/mp_rank_00/distrib_optim\.pt: its content changed",
    "layout": "global_step_1 holds no model parameters with placements",
    "task": "is not a reasoning-gym task: did you mean 'basic_arithmetic'",
    "data": "the number of rows to train on was 200 when the checkpoint was saved and is 201 now",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_that_only_a_rank_finds(runs: tuple[Path, str], mistake: str) -> None:
    directory, _ = runs
    found = json.loads((directory / "said.json").read_text())[mistake]
    assert found["code"] == 2
    assert found["said"].startswith("error: ") and found["said"].count("\n") == 1, found["said"]
    assert re.search(MISTAKES[mistake], found["said"])
    assert found["changed"] == []


def test_a_finished_run_says_that_nothing_is_left_to_do(runs: tuple[Path, str]) -> None:
    _, printed = runs
    said = [line for line in printed.splitlines() if line.startswith("nothing to do")]
    assert len(said) == 2
    for line, end in zip(said, (4, 3), strict=True):
        ends = rf"the run ends with step {end} \(.*runner\.max_steps {end} = \d optimizer steps\)"
        assert re.fullmatch(rf"nothing to do: the checkpoint is of step 4, and {ends}; raise that to train on", line)


def test_every_step_has_the_phases_that_the_report_stacks(runs: tuple[Path, str]) -> None:
    """This includes steps after a validation, which has already streamed their weights."""
    directory, _ = runs
    records = [json.loads(line) for line in (directory / "unbroken" / "metrics.jsonl").read_text().splitlines()]
    phases = [{name for name in TIME_SPLIT if name in record} for record in records[1:]]
    assert all(step == phases[0] >= {"time/stream", "time/generate", "time/train"} for step in phases)
    assert records[1]["time/stream"] == 0 < records[2]["time/stream"]


def test_prompts_that_are_left_out_are_counted(runs: tuple[Path, str]) -> None:
    _, printed = runs
    (filtered,) = (part for part in printed.split("---") if part.startswith(" filtered"))
    for name in ("training", "validation"):
        assert f"left out 1 of 2 {name} prompts that are longer than data.max_prompt_length=8 tokens\n" in filtered


def test_damaged_checkpoint_is_passed_over(runs: tuple[Path, str]) -> None:
    directory, printed = runs
    last = printed.split("---")[-1]
    assert f"not resuming from {directory}/damaged/checkpoints/global_step_4: " in last and "distrib_optim.pt" in last
    # Step 3 is the last one here, so it is validated as well.
    (record,) = metrics(directory / "damaged").values()
    expected = metrics(directory / "unbroken")[3]
    assert {name: value for name, value in record.items() if not name.startswith("validation/")} == expected


def test_a_run_goes_on_with_other_parallel_sizes(runs: tuple[Path, str]) -> None:
    """Two tensor-parallel ranks resume from one rank's checkpoint, and one rank from theirs."""
    directory, printed = runs
    assert "was written with TP 1, PP 1, DP 1; this run has TP 2, PP 1, DP 1" in printed
    unbroken = metrics(directory / "unbroken")
    for run, step in (("split", 3), ("joined", 4)):
        record = metrics(directory / run)[step]
        assert record["mismatch/logprob_max_abs"] < 1e-4
        # Its last step is validated; the unbroken run's third was not.
        expected = {name: record[name] for name in unbroken[step]}
        assert expected == pytest.approx(unbroken[step], rel=1e-2, abs=1e-5), run
    iteration = directory / "split" / "checkpoints" / "global_step_3" / "actor" / "iter_0000003"
    assert {".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"} <= {file.name for file in iteration.iterdir()}
    assert (iteration.parent / "hf_model" / "model.safetensors").is_file()


def test_the_config_that_init_writes_runs(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    assert 1 in metrics(directory / "init")
    assert (directory / "init" / "checkpoints" / "global_step_1" / "actor" / "hf_model").is_dir()


def test_a_reward_function_of_ones_own_trains(runs: tuple[Path, str]) -> None:
    """The README's function: -1 for an answer that is cut off, else 1 if right, less 0.01 per character."""
    directory, _ = runs
    record = metrics(directory / "own-reward")
    assert list(record) == [1, 2]
    for step in (1, 2):
        assert record[step]["train/verifier_failures"] == record[step]["train/verifier_timeouts"] == 0
        assert -1 <= record[step]["train/reward"] < 0 == record[step]["train/accuracy"]
    assert record[2]["policy/grad_norm"] > 0  # rewards differ in a group


def test_a_broken_reward_function_is_said_with_its_traceback(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    found = json.loads((directory / "broken.json").read_text())
    assert found["code"] == 2
    said = [line for line in found["said"].splitlines() if set(line) - set(" ~^")]
    file = directory / "rewards.py"
    assert said[0].startswith(
        f"error: reward.function={file}:broken raised on the answer to {directory}/questions.jsonl:"
    )
    assert said[1:] == [
        "Traceback (most recent call last):",
        f'  File "{file}", line 2, in broken',
        "    return 1 / (len(row) - 3)",
        "ZeroDivisionError: division by zero",
    ]

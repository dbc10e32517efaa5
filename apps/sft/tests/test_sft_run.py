"""Whole runs of the app: their files, and resuming as if the run had not been stopped."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from mbridge_config import HFFacts
from mbridge_config.plan.flops import forward_flops
from mbridge_train.data.encode import Encoder
from mbridge_train.data.loader import EncodedBatches
from mbridge_train.data.rows import read_examples
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from testing.app_runs import assert_same_state, execute, leaves, metrics, saved

PROGRAM = Path(__file__).parent / "sft_run_program.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory that the program's runs are in, and what they printed."""
    directory = tmp_path_factory.mktemp("runs")
    return directory, execute(str(PROGRAM), str(directory))


def validation(run: Path, step: int) -> dict[str, float]:
    return {name: value for name, value in metrics(run)[step].items() if name.startswith("validation/")}


def test_resumed_run_has_the_metrics_of_the_unbroken_one(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    unbroken = metrics(directory / "unbroken")
    assert list(unbroken) == [0, 1, 2, 3, 4]
    assert unbroken[4]["bad_rows"] == 1 and unbroken[4]["train/loss"] < unbroken[1]["train/loss"]
    assert metrics(directory / "stopped") == unbroken


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_resumed_run_has_the_state_of_the_unbroken_one(runs: tuple[Path, str], file: str) -> None:
    directory, _ = runs
    expected = saved(directory / "unbroken", 4, file)
    tensors = [value for _, value in leaves(expected) if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) > 100_000
    assert_same_state(saved(directory / "stopped", 4, file), expected)


def test_training_changes_tower_and_language_model(runs: tuple[Path, str]) -> None:
    """Otherwise the comparisons above would also hold for runs that do nothing."""
    directory, _ = runs
    before, after = (saved(directory / "unbroken", step, "model_optim_rng.pt")["model"] for step in (2, 4))
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == []
    assert any("vision" in name for name in before) and any("decoder" in name for name in before)


def test_loss_and_evaluation_agree_with_transformers(runs: tuple[Path, str]) -> None:
    """The loss of the trained model over the held-out answers, and its choices, by the plain model."""
    directory, _ = runs
    hf_directory = directory / "unbroken" / "checkpoints" / "global_step_4" / "actor" / "hf_model"
    model = AutoModelForImageTextToText.from_pretrained(hf_directory, attn_implementation="eager").eval()
    encoder = Encoder(hf_directory)
    batches = EncodedBatches(
        read_examples([directory / "eval"]),
        lambda example: (example, encoder.encode_choices(example)),
        batch_size=1,
        seed=None,
        epochs=1,
    )
    loss, tokens, right, count = 0.0, 0, 0, 0
    for ((example, candidates),) in batches:
        assert example.choices is not None
        scores = []
        for candidate in candidates:
            assert candidate.images is not None
            vision = encoder.decode(candidate.images)
            with torch.no_grad():
                logits = model(
                    input_ids=candidate.tokens[None],
                    pixel_values=vision.pixel_values,
                    image_grid_thw=vision.grid_thw,
                    mm_token_type_ids=(candidate.tokens == model.config.image_token_id)[None].int(),
                ).logits[0]
            logprobs = logits.log_softmax(-1)[:-1].gather(1, candidate.tokens[1:, None])[:, 0]
            scores.append(logprobs[candidate.trained[1:]])
        best = max(range(len(scores)), key=lambda number: float(scores[number].sum()))
        right += example.choices[best] == example.answer
        answer = scores[example.choices.index(example.answer)]
        loss -= float(answer.sum())
        tokens += len(answer)
        count += 1
    record = metrics(directory / "unbroken")[4]
    assert count == record["validation/examples"] == 7
    assert record["validation/loss"] == pytest.approx(loss / tokens, abs=1e-5)
    assert record["validation/accuracy"] == right / count


def test_evaluation_alone_says_what_training_said(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    expected = validation(directory / "unbroken", 4)
    assert {"validation/loss", "validation/accuracy", "validation/accuracy_by_mean"} <= expected.keys()
    assert validation(directory / "unbroken" / "evaluation", 4) == expected
    assert validation(directory / "from-hf" / "evaluation", 0) == pytest.approx(expected, rel=1e-6)
    assert not (directory / "from-hf" / "checkpoints").exists()


def test_frozen_parts_stay(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    start = AutoModelForImageTextToText.from_pretrained(directory / "model").state_dict()
    path = directory / "frozen" / "checkpoints" / "global_step_2" / "actor" / "hf_model"
    trained = AutoModelForImageTextToText.from_pretrained(path).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed and all("visual." in name and "merger" not in name for name in changed)


def test_a_text_model_learns_from_chats(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    record = metrics(directory / "text")
    assert record[4]["validation/loss"] < record[0]["validation/loss"]
    assert record[4]["images"] == 0 and "validation/accuracy" not in record[4]
    hf_directory = directory / "text" / "checkpoints" / "global_step_4" / "actor" / "hf_model"
    exported = AutoModelForCausalLM.from_pretrained(hf_directory).state_dict()
    megatron = saved(directory / "text", 4, "model_optim_rng.pt")["model"]
    assert torch.equal(exported["model.norm.weight"], megatron["decoder.final_layernorm.weight"])


def test_a_run_leaves_its_report_and_the_command_that_resumes_it(runs: tuple[Path, str]) -> None:
    directory, printed = runs
    report = (directory / "unbroken" / "report.html").read_text()
    assert "<svg" in report and "Evaluated examples" in report
    assert report.count('class="example"') == report.count("data:image/png;base64,") == 7
    assert "Which digit is this?" in report and "prediction: " in report
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", report)
    first_run = printed.split("---")[1]
    said = [line for line in printed.splitlines() if line.startswith("nothing to do")]
    end = "the run ends with step 4 (runner.max_steps 4)"
    assert said == [f"nothing to do: the checkpoint is of step 4, and {end}; raise that to train on"]
    assert f"{directory}/unbroken/report.html" in first_run and f"{directory}/train/a.parquet row 7" in first_run
    command = next(line for line in first_run.splitlines() if line.startswith("to go on"))
    assert "mbridge-sft" in command and "runner.resume_dir=auto" in command


MISTAKES = {
    "bad": r"train/a\.parquet row 7: the image of 12 bytes cannot be decoded",
    "large": r"whole/a\.parquet row \d+: the image has 32 x 32 pixels, more than 1000; make it smaller, raise",
    "long": r"train/a\.parquet row \d+: \d+ tokens, \d+ of them before or between answers, are more than 40 \(runner",
    "evaluation": r"there is no checkpoint to evaluate in .*m-evaluation/checkpoints; correct runner\.experiment_name",
    "data": r"data\.seed was 1234 when the checkpoint was saved and is 5 now",
    "order": r"the fingerprint of the rows and their order was \w{64} when the checkpoint was saved and is \w{64} now",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_that_only_a_rank_finds(runs: tuple[Path, str], mistake: str) -> None:
    directory, _ = runs
    found = json.loads((directory / "said.json").read_text())[mistake]
    assert found["code"] == 2
    said = found["said"][found["said"].index("error: ") :]
    assert said.count("\n") <= 2 and "Traceback" not in said
    assert re.search(MISTAKES[mistake], said), said
    assert found["changed"] == []


def test_pipeline_stages_train_and_evaluate_alike(runs: tuple[Path, str]) -> None:
    """Two stages go on from a checkpoint of one rank."""
    directory, _ = runs
    unbroken, stages = metrics(directory / "unbroken"), metrics(directory / "stages")
    assert list(stages) == [3, 4]
    for step in stages:
        assert stages[step] == pytest.approx(unbroken[step], rel=1e-3, abs=1e-4)


def test_profiled_step_leaves_a_trace_of_each_rank(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    assert [path.parent.name for path in directory.rglob("profiler")] == ["stages"]
    profiler = directory / "stages" / "profiler"
    files = {str(path.relative_to(profiler)) for path in profiler.rglob("*") if path.is_file()}
    chrome = {f"chrome_trace_rank{rank}_step4.json.gz" for rank in (0, 1)}
    assert files == chrome | {f"tensorboard/rank{rank}.4.pt.trace.json.gz" for rank in (0, 1)}
    for rank in (0, 1):
        content = gzip.decompress((profiler / f"chrome_trace_rank{rank}_step4.json.gz").read_bytes())
        tensorboard = profiler / "tensorboard" / f"rank{rank}.4.pt.trace.json.gz"
        assert gzip.decompress(tensorboard.read_bytes()) == content
        names = [event["name"] for event in json.loads(content)["traceEvents"]]
        for name in ("step 4", "forward_backward", "optimizer_step"):
            assert names.count(name) == 1, name
        assert "step 3" not in names and "aten::mm" in names


def test_operations_of_a_step_are_in_its_metrics(runs: tuple[Path, str]) -> None:
    """By the run's own figures: tokens, and time, on the text model, whose vocabulary decides most of it."""
    directory, _ = runs
    lines = (directory / "text" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    facts = HFFacts.load(directory / "text-model")
    for record in records:
        per_token = record["tflops_per_second"] * record["time/train"] * 1e12 / record["tokens"]
        # Sequences of n tokens in all cost least if all are of one length, and attention is a small part.
        least = forward_flops(facts, [1])
        assert least is not None
        assert least.training() < per_token < 1.1 * least.training()
        assert "mfu" not in record
    assert "Model operations" in (directory / "text" / "report.html").read_text()


def test_the_config_that_init_writes_runs(runs: tuple[Path, str]) -> None:
    directory, _ = runs
    assert 2 in metrics(directory / "init")
    assert (directory / "init" / "checkpoints" / "global_step_2" / "actor" / "hf_model").is_dir()

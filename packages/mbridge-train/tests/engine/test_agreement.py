"""Different global batches are detected before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import PLAIN, build, leave, make_batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agreement") / "model"
    make_model("qwen2", True, root)
    return root


def run_with(directory: Path, parallel: Parallel, change: str) -> Any:
    """Log probabilities and loss, or the errors, of passes in which rank 1 has a changed batch."""
    from mbridge_train.errors import TrainError
    from mbridge_train.losses.sft import sft_loss

    batch = make_batch(0)
    if torch.distributed.get_rank() == 1:
        match change:
            case "sample":
                del batch[1]
            case "token":
                batch[3].tokens[7] += 1
            case "weight":
                batch[0].weights *= 2
            case "order":
                batch.reverse()
            case "field":
                for sample in batch:
                    sample.fields["moon"] = torch.zeros(sample.length)
    try:
        engine = build(directory, parallel, PLAIN)
        results: list[Any] = []
        for action in (lambda: engine.logprobs(batch), lambda: engine.forward_backward(batch, sft_loss)["loss"]):
            try:
                results.append(action())
            except TrainError as error:
                results.append(str(error))
        return results
    finally:
        leave()


CHANGES = {
    "sample": "rank 1 in number of samples, lengths, tokens, weights, names of fields (4, not 5)",
    "token": "rank 1 in tokens",
    "weight": "rank 1 in weights",
    "order": "rank 1 in lengths, tokens, weights",
    "field": "rank 1 in names of fields",
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_batch_on_one_rank(gang2: Gang, model: Path, change: str) -> None:
    for messages in gang2.run(run_with, model, Parallel(), change, timeout=120):
        for message in messages:
            assert message.startswith(f"the ranks were given different global batches: {CHANGES[change]}; give every")


@pytest.mark.parametrize("parallel", [Parallel(tensor=2), Parallel(pipeline=2)], ids=["TP 2", "PP 2"])
def test_within_a_model_replica(gang2: Gang, model: Path, parallel: Parallel) -> None:
    for messages in gang2.run(run_with, model, parallel, "token", timeout=120):
        assert all("rank 1 in tokens" in message for message in messages)


def test_the_odd_one_of_four_is_named(gang4: Gang, model: Path) -> None:
    for messages in gang4.run(run_with, model, Parallel(tensor=2), "weight", timeout=120):
        assert all(": rank 1 in weights; give" in message for message in messages)


def test_the_same_batch_passes(gang2: Gang, model: Path) -> None:
    for logprobs, loss in gang2.run(run_with, model, Parallel(), "nothing", timeout=120):
        assert len(logprobs) == 5 and loss > 0

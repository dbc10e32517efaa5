"""The proposals of messages about the layout, given as arguments, correct it."""

from collections.abc import Callable
from pathlib import Path

from mbridge_config import Report

Checked = Callable[..., Report]

TP = "actor.model.tensor_model_parallel_size"
PP = "actor.model.pipeline_model_parallel_size"
FIRST = "actor.model.num_layers_in_first_pipeline_stage"
LAST = "actor.model.num_layers_in_last_pipeline_stage"


def test_tensor_sizes_that_messages_propose(checked: Checked, model: Path, make_model: Callable[..., Path]) -> None:
    """Each message proposes only what all of them accept: the good model takes 1, 2, 4, 6 and 12."""
    fixes = {problem.fix for problem in checked(f"{TP}=5").errors}
    assert fixes == {"use one of 1, 2, 4, 6, 12"}
    make_model(model, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=50)
    (problem,) = checked(f"{TP}=4", world_size=4).errors
    assert (problem.id, problem.fix) == ("tensor-parallel-ffn", "use one of 1, 2")
    assert problem.reason == "the model's experts' width 50 cannot be shared by 4 ranks"


def test_split_that_the_message_proposes(checked: Checked) -> None:
    """The proposed fix, given as arguments, corrects the config."""
    for given in (
        [f"{PP}=4"],
        [f"{PP}=3", f"{LAST}=3"],
        [f"{PP}=2", f"{FIRST}=3", f"{LAST}=2"],
        [f"{PP}=2", f"{FIRST}=9"],
    ):
        (problem,) = checked(*given).errors
        mended = [word for word in problem.fix.split() if "=" in word]
        assert checked(*given, *mended).errors == [], problem.fix
    (problem,) = checked(f"{PP}=3", f"{FIRST}=1", f"{LAST}=6").errors
    assert problem.fix == f"remove {FIRST} and {LAST}"
    (problem,) = checked(f"{PP}=7").errors
    assert problem.fix == "use one of 1, 2, 3, 6", "six layers are too few, however they are shared"
    assert [problem.key for problem in checked(f"{FIRST}=3", f"{LAST}=3").errors] == [FIRST, LAST]
    for key in (FIRST, LAST):
        (problem,) = checked(f"{PP}=2", f"{key}=0").errors
        assert (problem.id, problem.reason) == ("out-of-range", "less than 1")

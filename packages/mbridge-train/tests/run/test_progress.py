import io
import math

import pytest
from mbridge_train.run.output import TrainingProgress
from mbridge_train.run.report import format_figure
from rich.console import Console

FIGURES = {"loss": "loss", "reward/mean": "reward", "time/step": "seconds"}


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    with TrainingProgress(120, FIGURES, first_step=8, console=Console(file=output, width=20)) as progress:
        progress.step(9, {"reward/mean": 0.123456, "loss": -0.5, "unlisted": 1.0, "time/step": 2.0})
        progress.message("saved [bold]global_step_9[/bold]")
        progress.step(10, {"loss": math.nan})
    assert output.getvalue().splitlines() == [
        "step   9/120  loss -0.5  reward 0.1235  seconds 2",
        "saved [bold]global_step_9[/bold]",
        "step  10/120  loss nan",
    ]


def test_bar_on_a_terminal() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, color_system=None)
    with TrainingProgress(4, FIGURES, description="GRPO", console=console) as progress:
        progress.step(3, {"loss": 0.25})
    text = output.getvalue()
    assert "step 3/4  loss 0.25" in text
    assert "GRPO" in text
    assert "3/4" in text.split("loss 0.25")[1]


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (3.0, "3"), (123456.0, "123456"), (0.000123456, "0.0001235"), (math.inf, "inf")]
)
def test_format_figure(value: float, text: str) -> None:
    assert format_figure(value) == text

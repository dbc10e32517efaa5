"""Showing an SFT run: figures on the terminal, curves in the report, and a grid of evaluated examples."""

import base64
import io
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from mbridge_train.data.errors import RowError
from mbridge_train.data.examples import ImageReference
from mbridge_train.data.images import decode
from mbridge_train.run.output import THROUGHPUT_CHARTS, Display
from mbridge_train.run.report import Chart

from mbridge_sft.evaluation import Prediction

LONGEST_TEXT = 300
"""Most characters of a question or answer that the grid shows."""

IMAGE_SIDE = 192
"""Most pixels of the longer side of an image in the grid."""

DISPLAY = Display(
    description="SFT",
    figures={
        "train/loss": "loss",
        "validation/loss": "held-out loss",
        "validation/accuracy": "held-out accuracy",
        "train/grad_norm": "grad norm",
        "tokens_per_second": "tokens/s",
        "mfu": "mfu",
        "time/step": "seconds",
    },
    charts=(
        Chart(title="Loss", metrics=("train/loss", "validation/loss"), unit="nats per token", best="min"),
        Chart(title="Accuracy", metrics=("validation/accuracy", "validation/accuracy_by_mean"), best="max"),
        Chart(title="Gradient norm", metrics=("train/grad_norm",)),
        Chart(title="Learning rate", metrics=("train/learning_rate",), smooth=False),
        Chart(title="Tokens", metrics=("tokens_per_second",), unit="per second"),
        *THROUGHPUT_CHARTS,
        Chart(title="Images", metrics=("images_per_second",), unit="per second"),
        Chart(title="Padding", metrics=("padding_waste",), unit="share of computed tokens"),
        Chart(
            title="Time of a step",
            metrics=("time/data", "time/train", "time/other"),
            unit="seconds",
            stacked=True,
            smooth=False,
        ),
    ),
)


def example_grid(predictions: Sequence[Prediction]) -> str:
    """Return self-contained HTML with each example's images, question, right answer and prediction."""
    if not predictions:
        return ""
    templates = Environment(loader=PackageLoader("mbridge_sft", "."), autoescape=True, trim_blocks=True)
    templates.filters |= {"shortened": _shortened, "picture": _picture}
    return templates.get_template("examples.html.jinja").render(predictions=predictions)


def _picture(image: ImageReference, source: str) -> Markup:
    try:
        picture = decode(image, source)
    except RowError as error:  # the file has disappeared since the evaluation
        return Markup('<p class="note">{}</p>').format(_shortened(str(error)))
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="" src="data:image/png;base64,{}">').format(data)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"

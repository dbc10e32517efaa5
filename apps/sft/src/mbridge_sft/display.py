"""Showing an SFT run: figures on the terminal, curves in the report, and a grid of evaluated examples."""

import base64
import html
import io
from collections.abc import Sequence

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

_STYLE = """<style>
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
.example img { max-width: 100%; display: block; margin-bottom: 8px; }
.example p { margin: 0 0 4px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.right { color: #2e8b57; } .wrong { color: #cf4646; }
</style>"""


def example_grid(predictions: Sequence[Prediction]) -> str:
    """Return self-contained HTML with each example's images, question, right answer and prediction."""
    if not predictions:
        return ""
    cells = "\n".join(f'<div class="example">{_cell(prediction)}</div>' for prediction in predictions)
    return f'{_STYLE}<h2>Evaluated examples</h2><div class="examples">{cells}</div>'


def _cell(prediction: Prediction) -> str:
    example = prediction.example
    lines = [_image(image, example.source) for image in example.images]
    lines += [f"<p>{_text(example.messages[-1].text)}</p>", f"<p>answer: <b>{_text(example.answer)}</b></p>"]
    if prediction.predicted is not None:
        kind = "right" if prediction.is_right else "wrong"
        lines.append(f'<p>prediction: <b class="{kind}">{_text(prediction.predicted)}</b></p>')
    lines.append(f'<p class="note">{_text(example.source)}</p>')
    return "".join(lines)


def _image(image: ImageReference, source: str) -> str:
    try:
        picture = decode(image, source)
    except RowError as error:  # the file has disappeared since the evaluation
        return f'<p class="note">{_text(str(error))}</p>'
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _text(text: str) -> str:
    return html.escape(text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…")

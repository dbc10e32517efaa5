"""The report, read back with an HTML parser: its content, and that it is self-contained."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from mbridge_train.errors import TrainError
from mbridge_train.run.metrics import MetricsWriter
from mbridge_train.run.report import Chart, write_report

CHARTS = [
    Chart(title="Reward", metrics=("reward",), best="max"),
    Chart(title="Loss", metrics=("loss",), best="min", unit="nats"),
    Chart(title="Learning rate", metrics=("lr",), smooth=False),
    Chart(title="Time <split>", metrics=("time/*",), stacked=True, unit="seconds"),
    Chart(title="Memory", metrics=("memory",)),
]


class Page(HTMLParser):
    """Collects tags, identifiers, references and table rows."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "xlink:href", "src"}:
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self._open:
            self.rows[-1] += data + "|"


def record(directory: Path, steps: int) -> Path:
    with MetricsWriter(directory) as writer:
        for step in range(1, steps + 1):
            times: dict[str, Any] = {"time/train": 2.0, "time/rollout": 1.0}
            writer.write(step, {"reward": (step - 3) ** 2, "loss": 0.5 / step, "lr": 1e-5, **times})
    return writer.path


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_page_is_whole_and_needs_nothing_else(tmp_path: Path, steps: int) -> None:
    out = tmp_path / "report.html"
    write_report(record(tmp_path, steps), out, title="a < b", charts=CHARTS, config="key: <value>")
    text = out.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4
    assert "script" not in page.tags
    assert "link" not in page.tags
    # Every reference is to something in the page, and identifiers are unique.
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "<h1>a &lt; b</h1>" in text
    assert "key: &lt;value&gt;" in text
    assert "Not recorded: Memory." in text
    assert "not finite" not in text
    assert "currentColor" in text
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_summary_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(record(tmp_path, 5), out, title="run", charts=CHARTS)
    rows = Page(out.read_text()).rows
    assert rows[1:] == [
        "Reward|reward|4|4|4 |at step 1|",
        "Loss|loss|0.5|0.1|0.1 |at step 5|",
        "Learning rate|lr|1e-05|1e-05|",
        "Time <split>|time/rollout|1|1|",
        "Time <split>|time/train|2|2|",
    ]


def test_values_that_are_not_finite_are_gaps_with_a_warning(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": math.nan})
        writer.write(3, {"loss": 3.0})
    write_report(writer.path, tmp_path / "report.html", title="run", charts=CHARTS)
    text = (tmp_path / "report.html").read_text()
    assert "not finite in 1 step, the first at step 2: loss = nan." in text
    assert Page(text).rows[1] == "Loss|loss|1|3|1 |at step 1|"


def test_nothing_recorded(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).close()
    write_report(tmp_path / "metrics.jsonl", tmp_path / "report.html", title="run", charts=CHARTS)
    text = (tmp_path / "report.html").read_text()
    assert "No metrics yet." in text
    assert Page(text).tags.count("svg") == 0


def test_replaces_a_report_and_keeps_it_on_error(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    path = record(tmp_path, 2)
    write_report(path, out, title="first", charts=CHARTS)
    write_report(path, out, title="second", charts=CHARTS)
    assert "<h1>second</h1>" in out.read_text()
    path.write_text("{}\n")
    with pytest.raises(TrainError, match=r"metrics\.jsonl:1"):
        write_report(path, out, title="third", charts=CHARTS)
    assert "<h1>second</h1>" in out.read_text()

"""A metric is described once, in a file of `tiltflow.evaluation.metrics` that is found by being there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import tiny_recipe

from tiltflow.evaluation import metrics
from tiltflow.evaluation.metrics import Source, described
from tiltflow.plugins import module_of, names
from tiltflow.reports.report import write_report
from tiltflow.reports.tables import measures
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import read_yaml, validate


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Someone adds one file."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "sharpness.py").write_text(
        "from tiltflow.evaluation.metrics import Metric, Section\n"
        "METRICS = (\n"
        "    Metric('sharpness', 'Sharpness', 'Of {group} & others.', better='up', unit='share', section=Section.VARIED),\n"
        "    Metric('sharp', 'Sharp', 'Of a batch.', expect='rises.', source='training'),\n"
        ")\n"
    )
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path / "metrics")])
    monkeypatch.setattr(metrics, "names", lambda package: [*names(package), "sharpness"])
    metrics.every_metric.cache_clear()
    yield
    metrics.every_metric.cache_clear()


def test_every_family_is_in_the_order_and_no_key_is_described_twice() -> None:
    assert set(metrics.ORDER) == set(names("evaluation.metrics"))
    every = [metric for name in metrics.ORDER for metric in module_of("evaluation.metrics", name).METRICS]
    assert len({(metric.source, metric.key) for metric in every}) == len(every)
    assert sum(len(described(source)) for source in get_args(Source)) == len(every)
    for metric in every:
        assert metric.title[:1].isupper(), metric.key
        assert metric.meaning.endswith("."), metric.key
        assert bool(metric.section) == (metric.source == "summary"), metric.key
        assert bool(metric.expect) == (metric.source == "training"), metric.key
        assert metric.cost is None or (metric.compared and metric.better == "down"), metric.key


def test_everything_that_a_run_measures_is_described(tmp_path: Path) -> None:
    """Nothing of a run's summary is left for the list of numbers without a meaning."""
    method = {"name": "orw-cfm-w2", "num_inference_steps": 2, "num_passes": 2, "min_effective_sample_size": 1}
    for name, changes in {"am": {}, "orw": {"method": method}}.items():
        summary = run(validate(Recipe, read_yaml(tiny_recipe(tmp_path, **changes)), "recipe"), tmp_path / name)
        shown = measures(summary)
        assert ">Other<" not in shown
        assert all(row.meaning for rows in shown.values() for row in rows)


def test_a_family_that_someone_adds_is_on_the_page(tmp_path: Path, family: None) -> None:
    summary: dict[str, Any] = {"sharpness": 0.25, "judge": {"group": {"label": "the <cats>"}}}
    record = {"step": 1, "seconds": 1, "network_evaluations": 1, "sharp": 2.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    page = write_report(tmp_path).read_text()
    assert '<th>Sharpness</th><td class="value">25%</td><td class="what">Of the &lt;cats&gt; &amp; others.</td>' in page
    assert "<h3>Sharp</h3>" in page
    assert "Of a batch. <b>Expect:</b> rises." in page

"""The Grafana dashboard asks for metrics that the servers have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from manthanquant import contract, stats

DASHBOARD = Path(__file__).parents[2] / "charts/manthanquant/dashboards/models.json"
FULL = contract.Stats(
    model="m",
    kernel=contract.KernelReport("torch"),
    calibration=contract.CalibrationReport("gain", "Cached"),
    cache=contract.CacheReport("k42v3", "compressed", 3.25, 100, 512, 5.12, 1, 1, 1, 1, 1),
    writes=contract.WriteStats(1, 1, 1, 1, 1, 1, 1.0, 1.0, 1.0),
    hot=contract.HotStats(),
)


def test_every_metric_of_the_dashboard_is_served() -> None:
    served = {sample.name + ("_total" if sample.is_counter else "") for sample in stats.samples(FULL)}
    text = json.dumps(json.loads(DASHBOARD.read_text()))
    asked = set(re.findall(rf"\b{contract.METRIC_PREFIX}(?!io_)\w+", text))
    assert asked and asked <= served, asked - served

"""Results as a table, as JSON, and as a picture of roofline shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from manthanquant.bench.result import Result
from manthanquant.bench.timing import Roof


@dataclass(frozen=True)
class Setting:
    """Where and when: the card, the versions, the date."""

    card: str
    torch: str
    cuda: str
    driver: str
    manthanquant: str
    peers: str
    date: str


def table(results: Sequence[Result], roof: Roof) -> str:
    """Markdown, one line a result; shares are of the measured read bandwidth, where memory bounds the call."""
    rows = [
        (
            r.suite,
            r.case,
            r.subject,
            f"{r.milliseconds:.4f}",
            f"{r.teraflops:,.0f} TFLOP/s" if r.operations else f"{r.gigabytes_per_second:,.0f}",
            "" if r.operations else f"{100 * r.gigabytes_per_second / roof.read:.0f}%",
            r.note,
        )
        for r in results
    ]
    header = ("suite", "case", "subject", "ms", "GB/s", "of roof", "note")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_json(path: Path, results: Sequence[Result], roof: Roof, setting: Setting) -> None:
    content = {"setting": asdict(setting), "roof_gb_s": asdict(roof), "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw(path: Path, results: Sequence[Result], roof: Roof, setting: Setting) -> None:
    """A bar a result that memory bounds: its share of the read bandwidth. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [r for r in results if not r.operations]
    figure, axes = pyplot.subplots(figsize=(11, 0.32 * len(results) + 1.2))
    shares = [100 * r.gigabytes_per_second / roof.read for r in results]
    colours = ["#1f6f8b" if r.is_ours else "#b8b8b8" for r in results]
    places = range(len(results))
    axes.barh(places, shares, color=colours)
    axes.set_yticks(places, [f"{r.suite}: {r.case}: {r.subject}" for r in results], fontsize=7)
    for place, share, r in zip(places, shares, results):
        axes.text(share + 0.5, place, f"{r.milliseconds:.4f} ms", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.axvline(100, color="#444444", linewidth=0.8)
    axes.set_xlabel(f"% of the measured read bandwidth, {roof.read:,.0f} GB/s ({setting.card}, {setting.date})")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

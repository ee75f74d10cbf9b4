"""Results as a table, as JSON, and as a picture of roofline shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import Roof

COLUMNS = 2  # of panels


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
    """A panel a case that memory bounds, a bar a subject: its share of the read bandwidth. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        if not r.operations:
            cases.setdefault((r.suite, r.case), []).append(r)
    panels = list(cases.items())
    heights = [max(len(rows) for _, rows in panels[i : i + COLUMNS]) + 4 for i in range(0, len(panels), COLUMNS)]
    figure, grid = pyplot.subplots(
        len(heights),
        COLUMNS,
        figsize=(14, 0.16 * sum(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, ((suite, case), rows) in zip(grid.flat, panels):
        shares = [100 * r.gigabytes_per_second / roof.read for r in rows]
        axes.barh(range(len(rows)), shares, color=["#1f6f8b" if r.is_ours else "#b8b8b8" for r in rows])
        axes.set_yticks(range(len(rows)), [r.subject.removeprefix(f"{OURS} ") for r in rows], fontsize=6)
        for place, (share, r) in enumerate(zip(shares, rows)):
            axes.text(share + 1, place, f"{r.milliseconds:.4f} ms", va="center", fontsize=6)
        axes.invert_yaxis()
        axes.set_xlim(0, 115)
        axes.set_xticks([0, 50, 100])
        axes.tick_params(axis="x", labelsize=6)
        axes.axvline(100, color="#444444", linewidth=0.8)
        axes.set_title(f"{suite}: {case}", fontsize=8, loc="left")
    figure.supxlabel(
        f"% of the measured read bandwidth, {roof.read:,.0f} GB/s; {OURS} in colour ({setting.card}, {setting.date})",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

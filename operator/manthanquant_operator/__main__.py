"""`python -m manthanquant_operator`: run the operator, or print its CustomResourceDefinition."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from . import crd, settings
from .errors import SettingsError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="manthanquant_operator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_command = commands.add_parser("run", help="run the operator")
    run_command.add_argument("--settings", type=Path, help="YAML file with the admin's settings")
    run_command.add_argument("--verbose", action="store_true", help="log every request that is retried")
    crd_command = commands.add_parser("crd", help="print the CustomResourceDefinition")
    crd_command.add_argument("--chart", action="store_true", help="as the Helm chart's template")
    args = parser.parse_args(argv)
    if args.command == "crd":
        sys.stdout.write(crd.render_chart_template() if args.chart else crd.render())
        return 0
    return _run(args.settings, args.verbose)


def _run(path: Path | None, verbose: bool) -> int:
    from . import app  # kopf and the API client are not needed to print the CustomResourceDefinition

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for name in ("kopf", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        asyncio.run(app.run(settings.load(path)))
    except SettingsError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    except app.OperatorStopped as error:
        logging.getLogger(__name__).error("%s", error, exc_info=error.__cause__)  # a cause is a defect: say where
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m manthanquant_operator`: run the operator, or print its CustomResourceDefinition."""

from __future__ import annotations

import argparse
import sys

from . import crd


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="manthanquant_operator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    crd_command = commands.add_parser("crd", help="print the CustomResourceDefinition")
    crd_command.add_argument("--chart", action="store_true", help="as the Helm chart's template")
    args = parser.parse_args(argv)
    if args.command == "crd":
        sys.stdout.write(crd.render_chart_template() if args.chart else crd.render())
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())

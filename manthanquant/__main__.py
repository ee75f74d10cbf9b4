"""`python -m manthanquant`: the console script."""

import sys

from manthanquant.cli import main

sys.exit(main())

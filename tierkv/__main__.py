"""`python -m tierkv` is the command `tierkv`."""

import sys

from tierkv.cli.main import main

sys.exit(main())

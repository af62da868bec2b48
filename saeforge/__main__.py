"""`python -m saeforge`: the command, for where its script is not on the path."""

import sys

from saeforge.cli.main import main

sys.exit(main())

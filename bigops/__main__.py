"""`python -m bigops` is the `bigops` command."""

import sys

from bigops.cli import main

sys.exit(main())

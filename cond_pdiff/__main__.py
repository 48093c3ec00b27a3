"""`python -m cond_pdiff` is the command `cond-pdiff`."""

import sys

from cond_pdiff.cli import main

sys.exit(main())

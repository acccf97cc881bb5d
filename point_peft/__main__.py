"""`python -m point_peft` is the command line `point-peft`."""

import sys

from point_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())

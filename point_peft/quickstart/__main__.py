"""`python -m point_peft.quickstart` is the tour, once the packages that only it needs are found to be there."""

import importlib

from point_peft.data.optional import optional
from point_peft.errors import DataError

NEEDED = ("sklearn", "matplotlib", "tqdm")


def main() -> None:
    """Run the tour; without one of its packages say which extra has them, before anything is trained."""
    for package in NEEDED:
        try:
            optional(package, "the parts of the quickstart", "examples")
        except DataError as error:
            raise SystemExit(f"quickstart: error: {error}") from None
    importlib.import_module("point_peft.quickstart.tour").main()


if __name__ == "__main__":
    main()

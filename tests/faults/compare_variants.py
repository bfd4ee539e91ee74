"""Train two variants of a run as the demo does. usage: compare_variants.py RUN FOLDER"""

import sys
from pathlib import Path

from mpotrain.errors import MpotrainError
from mpotrain.twins import DENSE_TWIN, markdown_table, plot_curves, train_variants


def main() -> int:
    """Return the exit code."""
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        variants = train_variants(run, {"ttm": [], "dense": DENSE_TWIN}, folder)
    except MpotrainError as error:
        print(error)
        return error.exit_code
    plot_curves(variants, folder / "loss.png", "test")
    print(markdown_table(variants))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Verdicts over finished runs; the same as `layerplan compare`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))

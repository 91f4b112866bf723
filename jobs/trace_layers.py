"""Measures a model's layers and makes the freeze plan; the same as `layerplan trace`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["trace", *sys.argv[1:]]))

"""Scores a model, or checkpoints of a run; the same as `layerplan evaluate`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

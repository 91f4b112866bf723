"""Sends MLflow what did not arrive while it was down; the same as `layerplan track sync`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["track", "sync", *sys.argv[1:]]))

"""Ray Tune over boundaries; the same as `layerplan sweep`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))

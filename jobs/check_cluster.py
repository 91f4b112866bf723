"""Whether the nodes of a cluster are fit for a run; the same as `layerplan cluster check`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["cluster", "check", *sys.argv[1:]]))

"""Raw text to a token store; the same as `layerplan corpus build`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["corpus", "build", *sys.argv[1:]]))

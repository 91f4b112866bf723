"""Whether a token store is what was written; the same as `layerplan corpus verify`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["corpus", "verify", *sys.argv[1:]]))

"""Takes the measurements others choose layers by; the same as `layerplan measure`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["measure", *sys.argv[1:]]))

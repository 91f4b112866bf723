"""De-quantises a GGUF file into a safetensors folder; the same as `layerplan convert`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

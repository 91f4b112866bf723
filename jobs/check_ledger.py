"""Proofs over ledgers; the same as `layerplan ledger`."""

import sys

from layerplan.cli import main

if __name__ == "__main__":
    sys.exit(main(["ledger", *sys.argv[1:]]))

"""`layerplan convert`: a GGUF file as a safetensors folder.

A command whose model is a GGUF file converts it by itself, into a cache; this one makes the folder where you want it, or in
another dtype.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a .gguf file, or package://<import name>/<file>")
    parser.add_argument("folder", metavar="FOLDER", help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="dtype of the weights; auto is the narrowest that holds every stored value exactly",
    )


def execute(args: argparse.Namespace) -> None:
    """Converts the file and says what it was."""
    from layerplan.models.gguf import convert_gguf
    from layerplan.models.gguf_cache import PACKAGE_SCHEME, find_in_package

    path = find_in_package(args.file) if args.file.startswith(PACKAGE_SCHEME) else Path(args.file).expanduser()
    folder = Path(args.folder).expanduser().resolve()
    source = convert_gguf(path, folder, dtype=args.dtype)
    print(f"{folder}: made of {source}")
    if source.note:
        print(f"note: {source.note}")

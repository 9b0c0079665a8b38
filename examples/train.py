"""Trains from image labels, as `synernet train`: `accelerate launch` runs this file."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

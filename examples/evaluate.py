"""Scores a trained model, as `synernet evaluate`: `accelerate launch` runs this file."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

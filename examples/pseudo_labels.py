"""Writes the pseudo-labels of a whole data set, as `synernet pseudo-labels`: `accelerate launch` runs this file."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main(["pseudo-labels", *sys.argv[1:]]))

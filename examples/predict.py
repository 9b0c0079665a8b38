"""Segments images, as `synernet predict`."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))

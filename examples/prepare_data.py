"""Looks at a data set before training on it, as `synernet check-data`."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))

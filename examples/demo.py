"""Goes the whole way on generated images, as `synernet demo`."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

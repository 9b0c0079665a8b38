"""`python -m synernet_hf`: the command `synernet`."""

import sys

from synernet_hf.commands import main


if __name__ == "__main__":
    sys.exit(main())

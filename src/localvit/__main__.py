"""`python -m localvit`: the command line, for launchers such as torchrun that take a module."""

import sys

from localvit_cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The published program's command line: `python main.py --model NAME --eval --resume FILE --data-path DIR`."""

import sys

from localvit_cli.published import main

if __name__ == "__main__":
    sys.exit(main())

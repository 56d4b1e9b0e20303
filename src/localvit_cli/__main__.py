"""`python -m localvit_cli`, for launchers that want a module."""

import sys

from localvit_cli import main

sys.exit(main())

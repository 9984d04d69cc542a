"""``python -m safekern`` is the ``safekern`` command."""

import sys

from safekern.cli import main

sys.exit(main())

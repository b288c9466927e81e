"""``python -m mfx``: see :mod:`mfx.cli`."""

import sys

from mfx.cli import main

sys.exit(main())

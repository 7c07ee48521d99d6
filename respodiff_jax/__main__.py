"""`python -m respodiff_jax`, the same as `respodiff`."""

import sys

from respodiff_jax.cli import main

sys.exit(main())

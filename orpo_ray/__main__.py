"""`python -m orpo_ray` is `orpo-ray`."""

import sys

from orpo_ray.cli import main

sys.exit(main())

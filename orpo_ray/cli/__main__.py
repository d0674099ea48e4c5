"""`python -m orpo_ray.cli`, as submitted jobs call it."""

import sys

from orpo_ray.cli import main

sys.exit(main())

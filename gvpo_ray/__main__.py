"""`python -m gvpo_ray` is the command line `gvpo-ray`."""

import sys

from gvpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())

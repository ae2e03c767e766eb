"""Runs the command line: `python -m gvpo_ray` is `gvpo-ray`."""

import sys

from gvpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())

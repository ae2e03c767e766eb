"""`gvpo-ray train` as an entry point for `ray job submit`, which runs the code that it uploads:

ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml root=/shared
"""

import sys

from gvpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

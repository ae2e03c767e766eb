"""`gvpo-ray train` as an entry point for `ray job submit`:

    ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml run_dir=/shared/runs/quickstart
"""

import sys

from gvpo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""Entry point for `ray job submit`: python jobs/evaluate.py CONFIG [key=value …] [--checkpoint PATH] [--out
DIR].

    ray job submit --working-dir . -- python jobs/evaluate.py jobs/eval_paper.yaml model.path=/shared/model \\
        --out /shared/eval
"""

import sys

from gvpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

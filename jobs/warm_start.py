"""Make model.path from scratch and teach it by supervised learning, as the config's `warm_start` section
says:

    python jobs/warm_start.py jobs/quickstart.yaml [key=value …]

Does nothing when model.path is there.
"""

import sys

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner.warm_start import warm_start

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        warm_start(GVPOConfig.from_file(sys.argv[1], sys.argv[2:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command begins the warm start again", file=sys.stderr)
        sys.exit(130)

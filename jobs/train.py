"""`gvpo-ray train` as an entry point for `ray job submit`, which makes the model first where the config has a
`warm_start` section:

    ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml root=/shared
"""

import sys

from gvpo_ray.cli import main
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig


def train(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        try:
            config = GVPOConfig.from_file(arguments[0], arguments[1:])
            if config.warm_start is not None:
                # torch: not for a message about the config
                from gvpo_ray.learner.warm_start import warm_start

                warm_start(config)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command begins the warm start again", file=sys.stderr)
            return 130
    return main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))

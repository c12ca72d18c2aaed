"""The manifests as a cluster would read them: against the Kubernetes schemas, a policy, and what the server does.

Without kubectl the overlays are skipped, and say so; where REQUIRE_KUBECTL is set, as in the project's CI, they fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml

from foodextract.data import scenes
from foodextract.models import loading
from foodextract.schema import FoodRecord
from foodextract.serving.app import Settings, create_app
from foodextract.serving.server import WRITE_TIMEOUT
from test_server import encoded

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu", "gke")
DRAIN = (
    Settings().upload.timeout + Settings().queue.deadline + WRITE_TIMEOUT
)  # seconds until accepted images are answered
VERSION = "1.33.0"
CUSTOM = {
    "monitoring.coreos.com/v1",
    "monitoring.googleapis.com/v1",
    "keda.sh/v1alpha1",
}  # their schemas are not Kubernetes' own


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def rendered(overlay):
    """An overlay as `kubectl apply -k` would send it, by kind and name."""
    if not shutil.which("kubectl"):
        (pytest.fail if os.environ.get("REQUIRE_KUBECTL") else pytest.skip)(
            "kubectl renders the overlays, and is not here"
        )
    shown = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return {(one["kind"], one["metadata"]["name"]): one for one in documents(shown.stdout)}


def paths(kustomization):
    for entry in kustomization["resources"] + kustomization.get("patches", []):
        if isinstance(entry, str) or "path" in entry:
            yield entry if isinstance(entry, str) else entry["path"]


@pytest.mark.parametrize(
    "folder", [KUBERNETES / "base", *(KUBERNETES / "overlays" / name for name in OVERLAYS)], ids=lambda path: path.name
)
def test_every_file_is_used_and_every_used_file_is_there(folder):
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    used = set(paths(kustomization))
    assert all((folder / path).exists() for path in used)
    assert {path.name for path in folder.glob("*.yaml")} == {
        "kustomization.yaml",
        *(path for path in used if path.endswith(".yaml")),
    }


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("base/*.yaml")), ids=lambda path: path.name)
def test_base_files_fit_the_kubernetes_schemas(path):
    for document in documents(path.read_text()):
        if document["kind"] != "Kustomization":
            kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_fit_the_kubernetes_schemas(overlay):
    for document in rendered(overlay).values():
        if document["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_validator_would_notice():
    [_, deployment] = documents((KUBERNETES / "base/deployment.yaml").read_text())
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_keep_to_the_policy(overlay):
    everything = rendered(overlay)
    deployment = everything["Deployment", "foodextract"]
    pod = deployment["spec"]["template"]["spec"]
    assert "replicas" not in deployment["spec"]  # the autoscaler's
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {one["topologyKey"] for one in pod["topologySpreadConstraints"]} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    [container] = pod["containers"]
    assert re.fullmatch(r"\S+:v?\d[\w.-]*", container["image"])
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert container["resources"]["requests"] == container["resources"]["limits"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["OMP_NUM_THREADS"] == container["resources"]["limits"]["cpu"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert next(mount for mount in container["volumeMounts"] if mount["mountPath"] == "/model")["readOnly"]
    seconds = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    drain = (
        int(container["command"][container["command"].index("--shutdown-timeout") + 1]) if overlay == "gpu" else DRAIN
    )
    assert pod["terminationGracePeriodSeconds"] > seconds + drain
    [key] = [entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if entry["name"].endswith("_API_KEY")]
    assert not key.get("optional")  # without a key nobody would be asked for one
    assert container["image"].startswith(("registry.example.com/", "REGION-docker.pkg.dev/"))
    assert (
        everything["Namespace", "foodextract"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )
    deny = everything["NetworkPolicy", "default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def checkov(folder):
    """What the policy linter finds in the manifests of a folder: failed and passed checks, as `CKV_… resource`."""
    command = [
        Path(sys.prefix) / "checkov" / "bin" / "checkov",
        "--config-file",
        DEPLOY / "checkov.yaml",
        "-d",
        folder,
        "-o",
        "json",
    ]
    output = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["results"]
    return [
        {f"{check['check_id']} {check['resource']}" for check in output[f"{verdict}_checks"]}
        for verdict in ("failed", "passed", "skipped")
    ]


@pytest.mark.slow
def test_the_policy_linter_finds_nothing(tmp_path):
    for overlay in OVERLAYS:
        (tmp_path / f"{overlay}.yaml").write_text(yaml.safe_dump_all(rendered(overlay).values()))
    failed, passed, skipped = checkov(tmp_path)
    assert failed == set()
    assert len(passed) > 70
    assert skipped == {"CKV_K8S_38 Deployment.foodextract.foodextract"}  # GKE's


@pytest.mark.slow
def test_the_policy_linter_would_notice(tmp_path):
    everything = rendered("cpu")
    pod = everything["Deployment", "foodextract"]["spec"]["template"]["spec"]
    pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    (tmp_path / "worse.yaml").write_text(yaml.safe_dump_all(everything.values()))
    assert checkov(tmp_path)[0] == {"CKV_K8S_20 Deployment.foodextract.foodextract"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_points_at_the_pods_finds_them(overlay):
    everything = rendered(overlay)
    deployment = everything["Deployment", "foodextract"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    service = everything["Service", "foodextract"]
    assert service["spec"]["selector"].items() <= labels
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert everything["PodDisruptionBudget", "foodextract"]["spec"]["selector"]["matchLabels"].items() <= labels
    scaler = everything["ScaledObject" if overlay == "gpu" else "HorizontalPodAutoscaler", "foodextract"]
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "foodextract"}
    least = scaler["spec"]["minReplicaCount" if overlay == "gpu" else "minReplicas"]
    assert least > everything["PodDisruptionBudget", "foodextract"]["spec"]["maxUnavailable"]
    monitor = everything["PodMonitoring" if overlay == "gke" else "ServiceMonitor", "foodextract"]
    watched = labels if overlay == "gke" else service["metadata"]["labels"].items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= watched
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]
    assert all(("PersistentVolumeClaim", name) in everything for name in claims)
    assert {one["metadata"].get("namespace", "foodextract") for one in everything.values()} == {"foodextract"}


def test_the_runbook_pushes_what_is_deployed_and_makes_the_key_before():
    runbook = (DEPLOY / "README.md").read_text()
    for overlay in ("cpu", "gpu"):
        [image] = yaml.safe_load((KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text())["images"]
        assert f"docker push {image['newName']}:{image['newTag']}\n" in runbook
    steps = re.findall("base/namespace.yaml|create secret|kubectl apply -k|kubectl kustomize", runbook)
    assert steps[:3] == ["base/namespace.yaml", "create secret", "kubectl apply -k"]
    assert steps[3:6] == ["base/namespace.yaml", "create secret", "kubectl kustomize"]
    assert steps[6:] == ["base/namespace.yaml"]  # for the batch job, which needs no key


def test_probes_ask_what_the_server_answers():
    [_, deployment] = documents((KUBERNETES / "base/deployment.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    served = create_app(lambda: None, "m", Settings()).openapi()["paths"]
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} <= set(
        served
    )


def test_the_dockerfiles_pass_their_linter():
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([linter, *sorted(DEPLOY.rglob("Dockerfile"))], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_image_of_vllm_has_what_its_environment_has():
    wanted = {
        line
        for line in (DEPLOY / "vllm" / "requirements.txt").read_text().splitlines()
        if line.startswith(("vllm==", "num2words=="))
    }
    image = (DEPLOY / "vllm" / "Dockerfile").read_text()
    assert {f"vllm=={re.search('vllm-openai:v(.+)', image)[1]}", re.search("num2words==.+", image)[0]} == wanted


def test_the_image_starts_the_command_that_is_there_and_keeps_no_root():
    text = (DEPLOY / "Dockerfile").read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", text, re.M)[1])
    assert entry[0] == "foodextract"
    help_ = subprocess.run([sys.executable, "-m", *entry, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Answer images over HTTP" in help_
    final = text[text.rindex("FROM ") :]
    assert re.search(r"^USER 10001:10001$", final, re.M)
    assert "HF_HUB_OFFLINE=1" in final
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        for name in copied.split():
            assert f"!{name}" in ignored
            assert (DEPLOY.parent / name).exists()


@pytest.mark.slow
def test_the_image_s_own_steps_give_a_server_that_answers(tmp_path):
    """What the build stage runs, run here: from the files that it copies, by uv from its cache, into a folder in place
    of /app.
    """
    context, app, tuned = tmp_path / "src", tmp_path / "app", loading.TINY_TUNED
    build = (DEPLOY / "Dockerfile").read_text().split("FROM ")[1]
    for names, to in re.findall(r"^COPY (.+) (\S+)$", build, re.M):
        for name in names.split():
            source, target = DEPLOY.parent / name, context / to / ("" if name == to else Path(name).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    steps = [step for step in re.findall(r"^RUN ((?:.*\\\n)*.*)$", build, re.M) if step.startswith("uv ")]
    assert len(steps) == 2
    here = {
        "/app": str(app),
        ' --torch-backend "${TORCH_BACKEND}"': "",  # an index of its own
        "--no-cache": "--offline",
        "python3.12": f"python3.{sys.version_info.minor}",
        "uv venv": f"uv venv --python {sys.executable}",
        "uv ": f"{Path(sys.executable).with_name('uv')} ",
    }
    for step in steps:
        for old, new in here.items():
            step = step.replace(old, new)
        done = subprocess.run(["sh", "-ec", step], cwd=context, capture_output=True, text=True)
        if "Network connectivity is disabled" in done.stderr:
            pytest.skip("uv's cache has lost what `make install` put there")
        assert done.returncode == 0, done.stderr
    environment = {"PATH": f"{app}/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [app / "bin" / "foodextract", "serve", "--port", "0", "--model", tuned]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as served:
        try:
            said = []
            while not said or said[-1]["event"] != "ready":
                said.append(json.loads(served.stderr.readline()))
            port = next(re.search(r":(\d+) ", line["event"])[1] for line in said if "running on" in line["event"])
            image = encoded(scenes.draw_scene(7, "test", 0).image)
            answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=image, timeout=60, trust_env=False)
            assert FoodRecord.model_validate(answer.json()["record"])
            check = json.loads(
                re.search(r"^HEALTHCHECK .*\\\n +CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)[1]
            )
            proxied = environment | {"http_proxy": "http://127.0.0.1:9"}  # where nobody answers
            assert (
                subprocess.run([app / "bin" / "python", "-c", check[2].replace("8000", port)], env=proxied).returncode
                == 0
            )
        finally:
            served.terminate()
            served.stderr.read()
    assert served.returncode == 0
    installed = {path.name.split("-")[0].lower() for path in app.glob("lib/*/site-packages/*.dist-info")}
    assert installed.isdisjoint({"gradio", "trl", "datasets", "jupyter", "pip"})


def test_the_image_installs_the_server_at_the_locked_versions():
    [step] = re.findall(r"^ +uv pip install .+ -r pyproject.toml .*$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert step.endswith("--extra serve -c requirements.txt")  # the lock covers pyproject.toml: test_packaging


def test_compose_gives_each_service_what_its_manifest_does():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"foodextract", "foodextract-gpu"}
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN
        assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert float(services["foodextract"]["environment"]["OMP_NUM_THREADS"]) == services["foodextract"]["cpus"]

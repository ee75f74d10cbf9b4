"""The demo: from nothing to a small model that answers on a 3-bit cache, and its statistics in `kubectl get qm`.

    make demo                     on a cluster of its own, on this machine
    make demo CLUSTER=current     on the cluster of the current kubectl context
    make demo-down                remove what it made

Each step can run again: what is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

from e2e import images, model
from e2e.steps import Steps, note
from e2e.target import DemoError, Target, current_context, wait_for
from localcluster import binaries, lifecycle, packages, paths

NAMESPACE = "demo"
OPERATOR_NAMESPACE = "manthanquant-system"
RELEASE = "manthanquant"
CLAIM = "models"
MODEL = "smollm2"
QUESTION = "What is the capital of France?"
READY_SECONDS = 900

NAMESPACE_OBJECT = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}

# What a user writes: where the model is, and what serves it. The demo also keeps its cache small, and saves the minutes
# that compiling takes on two cores.
MANIFEST = f"""\
apiVersion: manthanquant.io/v1alpha1
kind: QuantizedModel
metadata:
  name: {MODEL}
spec:
  model: {{uri: pvc://{CLAIM}/{MODEL}}}
  resources: {{accelerator: cpu}}
  kvCache: {{memory: 1Gi}}
  engine: {{extraArgs: [--enforce-eager]}}
"""


# -- steps -------------------------------------------------------------------------------------------------------


def start_local_cluster(steps: Steps, name: str) -> Target:
    """Build what is missing, start the cluster, and load the images into it."""
    with steps.step("Debian packages"):
        installed = packages.install({**packages.CLUSTER, **images.PACKAGES})
        note(f"installed {' '.join(installed)}" if installed else "all there")
    with steps.step("Kubernetes and helm, built from Go modules (minutes, once)"):
        binaries.ensure((*binaries.CLUSTER, binaries.HELM), note)
    with steps.step("base image"):
        images.ensure_base(note)
    with steps.step("operator image"):
        operator = images.build("operator", note)
    with steps.step("server image (minutes, once)"):
        server = images.build("server-cpu", note)
    with steps.step("cluster"):
        cluster = lifecycle.up(name, keep_images=True, report=note)
    with steps.step("images into the cluster"):
        images.load(cluster, operator, note)
        images.load(cluster, server, note)
    return Target(cluster.kubeconfig, operator, server)


def use_current_context(steps: Steps) -> Target:
    """The cluster that kubectl talks to. Raises `DemoError` with what it needs where something is missing."""
    target = current_context()
    with steps.step("cluster of the current context"):
        if not shutil.which("kubectl"):
            raise DemoError("CLUSTER=current needs kubectl, with a context for the cluster")
        if not shutil.which("helm"):
            binaries.ensure((binaries.HELM,), note)
        note(target.kubectl("config", "current-context").strip())
        note(target.kubectl("get", "nodes", "--no-headers").strip())
    return target


def install_operator(target: Target) -> None:
    """Install or upgrade the operator with its Helm chart, and wait until it runs."""

    def values(key: str, reference: str) -> list[str]:
        repository, _, tag = reference.rpartition(":")
        return [f"--set-string={key}.repository={repository}", f"--set-string={key}.tag={tag}"]

    chart = str(images.REPOSITORY / "charts" / "manthanquant")
    settings = [*values("operator.image", target.operator_image), *values("images.cpu", target.server_image)]
    where = [f"--namespace={OPERATOR_NAMESPACE}", "--create-namespace"]
    target.helm("upgrade", "--install", RELEASE, chart, *where, *settings, "--set=telemetry.intervalSeconds=2")
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    deployments = target.get("deployments", f"--namespace={OPERATOR_NAMESPACE}", selector)["items"]
    for deployment in deployments:
        name = f"deployment/{deployment['metadata']['name']}"
        target.kubectl(f"--namespace={OPERATOR_NAMESPACE}", "rollout", "status", name, "--timeout=180s")
        note(f"{name} runs")


LOADER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "model-loader", "namespace": NAMESPACE},
    "spec": {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "models", "persistentVolumeClaim": {"claimName": CLAIM}},
            {"name": "work", "emptyDir": {}},
        ],
        "containers": [
            {
                "name": "loader",
                "command": ["sleep", "3600"],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                "volumeMounts": [
                    {"name": "models", "mountPath": "/models"},
                    {"name": "work", "mountPath": "/work"},
                ],
            }
        ],
    },
}
CLAIM_OBJECT = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": CLAIM, "namespace": NAMESPACE},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}},
}


def put_model_on_claim(target: Target) -> None:
    """Copy the model onto a claim through a pod; the first time that pod also converts it."""
    pod = json.loads(json.dumps(LOADER))
    pod["spec"]["containers"][0]["image"] = target.server_image
    target.apply(NAMESPACE_OBJECT, CLAIM_OBJECT)
    wait_for("the ServiceAccount", 60, lambda: target.get("serviceaccount", "default", f"--namespace={NAMESPACE}"))
    target.apply(pod)
    here = f"--namespace={NAMESPACE}"
    target.kubectl(here, "wait", "--for=condition=Ready", "pod/model-loader", "--timeout=300s")
    execute = (here, "exec", "model-loader")
    if target.kubectl(*execute, "--", "find", "/models", "-path", f"*/{MODEL}/config.json"):
        note("the model is on the claim")
    else:
        kept = model.converted()
        if not kept.exists():
            _convert(target, execute, kept)
        with kept.open("rb") as archive:
            target.stream(*execute, "--stdin", "--", "tar", "-x", "-C", "/models", stdin=archive)
        note(f"copied {kept.stat().st_size / 1e6:.0f} MB to claim {CLAIM}")
    target.kubectl(here, "delete", "pod", "model-loader")  # the claim may be for one pod at a time


def _convert(target: Target, execute: tuple[str, ...], kept: Path) -> None:
    """Convert the GGUF in the loader's pod, and keep the result on this machine."""
    note(f"converting {model.GGUF_NAME} to safetensors in a pod (once)")
    with model.gguf().open("rb") as source:
        target.stream(*execute, "--stdin", "--", "sh", "-c", "cat > /work/model.gguf", stdin=source)
    target.kubectl(*execute, "--", "python", "-m", "manthanquant.gguf", "/work/model.gguf", f"/work/{model.NAME}")
    partial = kept.with_suffix(".partial")
    with partial.open("wb") as output:
        target.stream(*execute, "--", "tar", "-c", "-C", "/work", model.NAME, stdout=output)
    partial.rename(kept)


def serve_model(target: Target) -> dict[str, Any]:
    """Apply the QuantizedModel and wait until it is Ready and measured; each change of a condition is shown."""
    target.kubectl("apply", f"--namespace={NAMESPACE}", "--filename=-", stdin=MANIFEST)
    seen: dict[str, str] = {}

    def ready() -> dict[str, Any] | None:
        found = get_model(target)
        for condition in found.get("status", {}).get("conditions", []):
            text = f"{condition['type']}={condition['status']} {condition['reason']}: {condition.get('message', '')}"
            if seen.get(condition["type"]) != text:
                seen[condition["type"]] = text
                note(text)
        return found if is_true(found, "Ready") and is_true(found, "TelemetryAvailable") else None

    try:
        found: dict[str, Any] = wait_for(f"QuantizedModel {MODEL} being Ready", READY_SECONDS, ready)
    except DemoError as error:
        raise DemoError(f"{error}\n{evidence(target)}") from error
    return found


def get_model(target: Target) -> dict[str, Any]:
    found: dict[str, Any] = target.get("quantizedmodel", MODEL, f"--namespace={NAMESPACE}")
    return found


def is_true(quantized_model: dict[str, Any], condition: str) -> bool:
    """Whether a condition is True for the spec as it is now."""
    generation = quantized_model["metadata"]["generation"]
    conditions = quantized_model.get("status", {}).get("conditions", [])
    return any(
        c["type"] == condition and c["status"] == "True" and c["observedGeneration"] == generation for c in conditions
    )


def wait_until_counted(target: Target, writes: int) -> dict[str, Any]:
    """Wait until the status counts more cache writes than `writes`."""

    def counted() -> dict[str, Any] | None:
        found = get_model(target)
        return found if found["status"]["kvCache"].get("writes", 0) > writes else None

    found: dict[str, Any] = wait_for("the count of the answer's cache writes", 60, counted)
    return found


def ask(target: Target, question: str = QUESTION) -> str:
    """A chat completion through the model's Service."""
    service = target.get("service", MODEL, f"--namespace={NAMESPACE}")
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0}
    with target.port_forward(NAMESPACE, f"service/{MODEL}", service["spec"]["ports"][0]["port"]) as port:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as response:
            answer = json.load(response)
    return str(answer["choices"][0]["message"]["content"])


def evidence(target: Target) -> str:
    """What explains a failure: the model's description, its pods, and the ends of their logs."""
    here = f"--namespace={NAMESPACE}"
    parts = [
        target.kubectl(here, "describe", "quantizedmodel", MODEL),
        target.kubectl(here, "get", "pods", "--output=wide"),
    ]
    for pod in target.get("pods", here)["items"]:
        name = pod["metadata"]["name"]
        parts.append(f"--- {name}\n" + target.kubectl(here, "logs", name, "--all-containers", "--tail=30"))
    return "\n".join(parts)


def show(target: Target) -> None:
    """What a user looks at: the table and the description."""
    here = f"--namespace={NAMESPACE}"
    for command in (("get", "qm"), ("describe", "qm", MODEL)):
        print(f"\n$ kubectl {' '.join((*command, here))}\n{target.kubectl(*command, here)}", end="", flush=True)


# -- commands ----------------------------------------------------------------------------------------------------


def run(cluster: str, name: str) -> None:
    steps = Steps()
    target = use_current_context(steps) if cluster == "current" else start_local_cluster(steps, name)
    with steps.step("operator, by its Helm chart"):
        install_operator(target)
    with steps.step("model on a claim"):
        put_model_on_claim(target)
    with steps.step("QuantizedModel to Ready"):
        for line in MANIFEST.splitlines():
            note(f"  {line}")
        served = serve_model(target)
    with steps.step("chat completion through the Service"):
        note(f"> {QUESTION}")
        for line in ask(target).splitlines():
            note(f"  {line}")
    with steps.step("the statistics"):
        wait_until_counted(target, served["status"]["kvCache"].get("writes", 0))
        show(target)
    print(f"\n{steps.summary()}")
    if target.kubeconfig:
        print(f"\nLook around:  export KUBECONFIG={target.kubeconfig} PATH={paths.bin_dir()}:$PATH")
    print("Remove it:    make demo-down" + (" CLUSTER=current" if cluster == "current" else ""))


def down(cluster: str, name: str) -> None:
    if cluster != "current":
        lifecycle.down(name)
        print(f"kept for the next time: {paths.cache_dir()} and buildah's images (localhost/manthanquant-*)")
        return
    target = Target(None, "", "")
    target.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    target.helm("uninstall", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--ignore-not-found")
    target.kubectl("delete", "customresourcedefinition", "quantizedmodels.manthanquant.io", "--ignore-not-found")
    target.kubectl("delete", "namespace", OPERATOR_NAMESPACE, "--ignore-not-found")


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("--cluster", choices=("local", "current"), default=os.environ.get("CLUSTER", "local"))
    parser.add_argument("--name", default="demo", help="the local cluster's name (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        (run if arguments.command == "up" else down)(arguments.cluster, arguments.name)
    except (DemoError, RuntimeError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build the images from the Dockerfile with buildah, and move them into the local cluster."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from localcluster import packages
from localcluster.lifecycle import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
BASE_IMAGE = "localhost/manthanquant-base:bookworm"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}

Report = Callable[[str], None]


def ensure_base(report: Report) -> None:
    """Make the Debian base image, unless it is there."""
    packages.install(PACKAGES)
    if _buildah("images", "--quiet", BASE_IMAGE, check=False).stdout.strip():
        report(f"{BASE_IMAGE} is there")
        return
    done = subprocess.run([str(REPOSITORY / "image" / "base.sh"), BASE_IMAGE], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"image/base.sh failed:\n{done.stderr[-2000:]}")
    report(done.stdout.strip())


def build(target: str, report: Report) -> str:
    """Build a target of the Dockerfile. Returns a reference whose tag names the content."""
    repository = f"localhost/manthanquant-{target}"
    arguments = ["--build-arg", f"BASE_IMAGE={BASE_IMAGE}"]
    if index := os.environ.get("PACKAGE_INDEX"):
        arguments += ["--build-arg", f"PACKAGE_INDEX={index}"]
    if CA_BUNDLE.exists():
        arguments += ["--secret", f"id=ca_bundle,src={CA_BUNDLE}"]
    with tempfile.NamedTemporaryFile("r") as identity:
        command = ["build", "--layers", "--target", target, *arguments, "--iidfile", identity.name]
        done = _buildah(*command, "--tag", f"{repository}:latest", str(REPOSITORY), check=False)
        if done.returncode:
            raise RuntimeError(f"the build of {target} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        digest = identity.read().strip().removeprefix("sha256:")
    reference = f"{repository}:{digest[:12]}"
    _buildah("tag", digest, reference)
    names = _buildah("images", "--format", "{{.Name}}:{{.Tag}}").stdout.split()
    kept = (reference, f"{repository}:latest")
    if older := [name for name in names if name.startswith(f"{repository}:") and name not in kept]:
        _buildah("rmi", *older, check=False)  # one that is in use stays
    cached = sum(line.startswith("--> Using cache") for line in done.stdout.splitlines())
    size = _buildah("images", "--format", "{{.Size}}", reference).stdout.split("\n")[0]
    report(f"{reference}, {size}, {cached} steps from the cache")
    return reference


def smoke(reference: str, target: str) -> str:
    """Run image/smoke.py inside an image, as its user. Returns what it prints; raises with that where it fails."""
    container = _buildah("from", reference).stdout.strip()
    try:
        script = f"{REPOSITORY / 'image' / 'smoke.py'}:/smoke.py:ro"
        done = _buildah("run", "--volume", script, container, "--", "python", "/smoke.py", target, check=False)
    finally:
        _buildah("rm", container)
    if done.returncode:
        raise RuntimeError(f"{reference}: {done.stdout}{done.stderr}")
    return done.stdout


def load(cluster: Cluster, reference: str, report: Report) -> None:
    """Stream an image from buildah's storage into the node, unless the node has it."""
    images = ("ctr", "--namespace", "k8s.io", "images")
    listed = cluster.run_in_node(*images, "list", "--quiet").split()
    if reference in listed:
        report(f"{reference} is there")
        return
    push = ["buildah", "push", "--quiet", reference, f"docker-archive:/dev/stdout:{reference}"]
    sender = subprocess.Popen(push, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert sender.stdout is not None and sender.stderr is not None
    try:
        cluster.run_in_node(*images, "import", "-", stdin=sender.stdout)
    finally:
        sender.stdout.close()
        error = sender.stderr.read().decode()
        failed = sender.wait()
    if failed:
        raise RuntimeError(f"buildah push {reference} failed: {error}")
    repository = reference.rpartition(":")[0]
    if older := [name for name in listed if name.rpartition(":")[0] == repository]:
        cluster.run_in_node(*images, "remove", *older)  # containers that run on them keep running


def _buildah(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # chroot isolation needs no runtime, no systemd and no cgroup of its own.
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    return subprocess.run(["buildah", *arguments], check=check, capture_output=True, text=True, env=environment)

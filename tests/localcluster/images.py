"""Container images on the node: the sandbox image, made here, and the import of archives."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_single_file_image(archive: Path, reference: str, program: Path) -> None:
    """Write a docker-archive of an image that holds one static program and runs it. The bytes depend on it alone."""
    layer = _tar([(program.name, program.read_bytes(), 0o755)])
    diff_id = hashlib.sha256(layer).hexdigest()
    image = {
        "architecture": ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
    }
    config = json.dumps(image, sort_keys=True).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [reference], "Layers": ["layer.tar"]}]
    members = [
        (config_name, config, 0o644),
        ("layer.tar", layer, 0o644),
        ("manifest.json", json.dumps(manifest).encode(), 0o644),
    ]
    archive.write_bytes(_tar(members))


def _tar(members: list[tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content, mode in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

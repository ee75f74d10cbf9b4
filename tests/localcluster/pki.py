"""Certificates by `openssl`, bearer tokens, and a kubeconfig for each user of the cluster."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
from pathlib import Path

from localcluster import config

DAYS = "30"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")


def _certificate(folder: Path, name: str, subject: str, usage: str, names: tuple[str, ...] = ()) -> None:
    extensions = f"extendedKeyUsage={usage}\n" + (f"subjectAltName={','.join(names)}\n" if names else "")
    (folder / f"{name}.ext").write_text(extensions)
    request = ("-keyout", f"{name}.key", "-subj", subject, "-out", f"{name}.csr")
    _openssl(folder, "req", *_NEW_KEY, *request)
    sign = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", DAYS, "-extfile", f"{name}.ext")
    _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.crt")


def create(instance: config.Instance, folder: Path) -> None:
    """Fill `folder/pki` for the node, and write `folder/kubeconfig` for the host's users (cluster-admin)."""
    pki = folder / "pki"
    pki.chmod(0o700)
    ca = ("-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=localcluster", "-days", DAYS)
    _openssl(pki, "req", "-x509", *_NEW_KEY, *ca)
    _certificate(pki, "apiserver", "/CN=kube-apiserver", "serverAuth", config.API_SERVER_NAMES)
    # The one connection that cannot use a token: from the API server to the kubelet.
    _certificate(pki, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", "clientAuth")
    _certificate(pki, "front-proxy", "/CN=front-proxy-client", "clientAuth")
    _openssl(pki, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "service-account.key")

    authority = base64.b64encode((pki / "ca.crt").read_bytes()).decode()
    rows = []
    for user in config.USERS:
        token = secrets.token_hex(24)
        rows.append(f'{token},{user.user},{user.user},"{user.group}"\n')
        inside = config.kubeconfig(config.NODE_API_URL, authority, token)
        (pki / f"{user.name}.json").write_text(json.dumps(inside))
        if user is config.ADMIN:
            outside = folder / "kubeconfig"
            outside.touch(mode=0o600)
            outside.write_text(json.dumps(config.kubeconfig(instance.host_url, authority, token)))
    (pki / "tokens.csv").write_text("".join(rows))
    for path in pki.iterdir():
        os.chmod(path, 0o600)

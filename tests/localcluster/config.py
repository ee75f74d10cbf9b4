"""The cluster's configuration: addresses, files and command lines, each defined here once.

Everything is a pure function of an `Instance`. The files are JSON, which every consumer reads as YAML. Paths are those
that the node sees: its state is bound at `NODE_DIR`, whatever folder holds it outside.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

KUBERNETES_VERSION = "v1.37.2"
NODE_NAME = "node1"
STORAGE_CLASS = "local"

# Each cluster has a network namespace of its own without an uplink, so all may use the same addresses.
NODE_IP = "10.89.0.1"
POD_CIDR = "10.88.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
KUBERNETES_SERVICE_IP = "10.96.0.1"
DOMAIN = "cluster.local"
API_PORT = 6443
ETCD_URL = "http://127.0.0.1:2379"
NODE_API_URL = f"https://127.0.0.1:{API_PORT}"

NODE_DIR = "/run/localcluster"  # the instance's folder, inside the node
NODE_BIN = "/run/localcluster-bin"  # the cached binaries, inside the node
PKI = f"{NODE_DIR}/pki"
AUDIT_LOG = "logs/audit.log"  # in the instance's folder: one JSON object a line for each request of `_audit_policy`
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
PAUSE_IMAGE = "localhost/pause:1"


@dataclasses.dataclass(frozen=True)
class Instance:
    """One cluster.

    `port` is the API server's on the host's 127.0.0.1. `nodes` is False for a bare control plane. `shared_images` says
    that its images lie in the store that outlives clusters, and not in its own folder.
    """

    name: str
    port: int
    nodes: bool = True
    shared_images: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", self.name):
            raise ValueError(f"name: {self.name!r}; use 1 to 32 lower-case letters, digits and dashes")

    @property
    def cgroup(self) -> str:
        return f"localcluster-{self.name}"

    @property
    def host_url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Instance:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class User:
    """An identity of the token file. A kubeconfig `<name>.json` is written for each."""

    name: str
    user: str
    group: str = ""


ADMIN = User("admin", "admin", "system:masters")
KUBELET = User("kubelet", f"system:node:{NODE_NAME}", "system:nodes")
CONTROLLER_MANAGER = User("controller-manager", "system:kube-controller-manager")
SCHEDULER = User("scheduler", "system:kube-scheduler")
PROXY = User("proxy", "system:kube-proxy")
DNS = User("dns", "localcluster:dns")
PROVISIONER = User("provisioner", "localcluster:provisioner")
USERS = (ADMIN, KUBELET, CONTROLLER_MANAGER, SCHEDULER, PROXY, DNS, PROVISIONER)

# Names that the API server's certificate is valid for.
API_SERVER_NAMES = (
    "DNS:kubernetes",
    "DNS:kubernetes.default",
    "DNS:kubernetes.default.svc",
    f"DNS:kubernetes.default.svc.{DOMAIN}",
    "DNS:localhost",
    "IP:127.0.0.1",
    f"IP:{NODE_IP}",
    f"IP:{KUBERNETES_SERVICE_IP}",
)


def kubeconfig_path(user: User) -> str:
    return f"{PKI}/{user.name}.json"


def kubeconfig(url: str, ca_base64: str, token: str) -> dict[str, Any]:
    """A kubeconfig with one cluster, one user and one context."""
    name = "localcluster"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": url, "certificate-authority-data": ca_base64}}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }


# -- files in the instance's folder ------------------------------------------------------------------------------


def _kubelet() -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "enforceNodeAllocatable": ["pods"],
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "clusterDNS": [NODE_IP],
        "clusterDomain": DOMAIN,
        "resolvConf": f"{NODE_DIR}/resolv.conf",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "readOnlyPort": 0,
        "volumePluginDir": f"{NODE_DIR}/volume-plugins",
        # Images are imported and cannot be pulled again: a full disk must not delete them.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "200Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        # What a device plug-in or a patch of the node's capacity changes is seen after this long.
        "nodeStatusUpdateFrequency": "2s",
    }


def _cni() -> dict[str, Any]:
    ranges = [[{"subnet": POD_CIDR}]]
    return {
        "cniVersion": "0.4.0",
        "name": "localcluster",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipMasq": False,
                "hairpinMode": True,
                "ipam": {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def _audit_policy() -> dict[str, Any]:
    """Record who writes what, and what pods' accounts read; the cluster's own reads are left out.

    By it tests count an operator's writes, and compare what it does with what it may do.
    """
    reads = {"verbs": ["get", "list", "watch"]}
    return {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"], **reads},
            {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
            {"level": "None", **reads},
            {"level": "Metadata"},
        ],
    }


_CONTAINERD = f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # runc cannot lower oom_score_adj without CAP_SYS_RESOURCE, which a container or a micro VM often lacks.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{NODE_DIR}/cni"
"""

_COREFILE = f"""\
.:53 {{
  bind {NODE_IP}
  errors
  kubernetes {DOMAIN} in-addr.arpa {{
    kubeconfig {kubeconfig_path(DNS)} localcluster
    pods insecure
    ttl 5
  }}
  cache 5
}}
"""


def files() -> dict[str, str]:
    """Configuration files by their path in the instance's folder."""
    return {
        "audit-policy.json": json.dumps(_audit_policy()),
        "kubelet.json": json.dumps(_kubelet(), indent=1),
        "cni/10-bridge.conflist": json.dumps(_cni(), indent=1),
        "containerd.toml": _CONTAINERD,
        "Corefile": _COREFILE,
        "resolv.conf": f"nameserver {NODE_IP}\n",
    }


# -- processes ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Component:
    """A process of the node. `after_api` waits for the API server; `needs_node` is left out of a control plane."""

    name: str
    argv: tuple[str, ...]
    after_api: bool = True
    needs_node: bool = False


def _flags(program: str, **flags: str | int | bool) -> tuple[str, ...]:
    def text(value: str | int | bool) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    options = (f"--{name.replace('_', '-')}={text(value)}" for name, value in flags.items())
    return (f"{NODE_BIN}/{program}", *options)


def components(instance: Instance, python: str) -> list[Component]:
    """The node's processes in start order. `python` runs the provisioner."""
    chosen = [
        Component("containerd", ("containerd", "-c", f"{NODE_DIR}/containerd.toml"), after_api=False, needs_node=True),
        Component(
            "etcd",
            _flags(
                "etcd",
                data_dir="/var/lib/etcd",
                listen_client_urls=ETCD_URL,
                advertise_client_urls=ETCD_URL,
                listen_peer_urls="http://127.0.0.1:2380",
                unsafe_no_fsync=True,
                log_level="warn",
            ),
            after_api=False,
        ),
        Component("kube-apiserver", _api_server(), after_api=False),
        Component(
            "kube-controller-manager",
            _flags(
                "kube-controller-manager",
                kubeconfig=kubeconfig_path(CONTROLLER_MANAGER),
                use_service_account_credentials=True,
                service_account_private_key_file=f"{PKI}/service-account.key",
                root_ca_file=f"{PKI}/ca.crt",
                cluster_signing_cert_file=f"{PKI}/ca.crt",
                cluster_signing_key_file=f"{PKI}/ca.key",
                leader_elect=False,
                bind_address="127.0.0.1",
                profiling=False,
                # The defaults throttle a fresh cluster: its first ServiceAccount would come five seconds later.
                kube_api_qps=200,
                kube_api_burst=400,
                controller_start_interval="0s",
                pvclaimbinder_sync_period="1s",
                flex_volume_plugin_dir=f"{NODE_DIR}/volume-plugins",
            ),
        ),
        Component(
            "kube-scheduler",
            _flags(
                "kube-scheduler",
                kubeconfig=kubeconfig_path(SCHEDULER),
                leader_elect=False,
                bind_address="127.0.0.1",
                profiling=False,
            ),
        ),
        Component(
            "kubelet",
            _flags(
                "kubelet",
                config=f"{NODE_DIR}/kubelet.json",
                kubeconfig=kubeconfig_path(KUBELET),
                hostname_override=NODE_NAME,
                node_ip=NODE_IP,
            ),
            needs_node=True,
        ),
        Component(
            "kube-proxy",
            _flags(
                "kube-proxy",
                kubeconfig=kubeconfig_path(PROXY),
                hostname_override=NODE_NAME,
                proxy_mode="iptables",
                cluster_cidr=POD_CIDR,
                # Zero leaves the host's connection tracking as it is.
                conntrack_max_per_core=0,
                conntrack_min=0,
                conntrack_tcp_timeout_established="0s",
                conntrack_tcp_timeout_close_wait="0s",
                metrics_bind_address="127.0.0.1:10249",
            ),
            needs_node=True,
        ),
        Component("coredns", (f"{NODE_BIN}/coredns", "-conf", f"{NODE_DIR}/Corefile"), needs_node=True),
        Component("provisioner", (python, "-m", "localcluster.provisioner")),
    ]
    return [component for component in chosen if instance.nodes or not component.needs_node]


def _api_server() -> tuple[str, ...]:
    return _flags(
        "kube-apiserver",
        etcd_servers=ETCD_URL,
        advertise_address=NODE_IP,
        bind_address="0.0.0.0",
        secure_port=API_PORT,
        service_cluster_ip_range=SERVICE_CIDR,
        authorization_mode="Node,RBAC",
        token_auth_file=f"{PKI}/tokens.csv",
        client_ca_file=f"{PKI}/ca.crt",
        tls_cert_file=f"{PKI}/apiserver.crt",
        tls_private_key_file=f"{PKI}/apiserver.key",
        kubelet_client_certificate=f"{PKI}/kubelet-client.crt",
        kubelet_client_key=f"{PKI}/kubelet-client.key",
        kubelet_preferred_address_types="InternalIP",
        service_account_issuer=f"https://kubernetes.default.svc.{DOMAIN}",
        service_account_signing_key_file=f"{PKI}/service-account.key",
        service_account_key_file=f"{PKI}/service-account.key",
        requestheader_client_ca_file=f"{PKI}/ca.crt",
        requestheader_allowed_names="front-proxy-client",
        requestheader_username_headers="X-Remote-User",
        requestheader_group_headers="X-Remote-Group",
        requestheader_extra_headers_prefix="X-Remote-Extra-",
        proxy_client_cert_file=f"{PKI}/front-proxy.crt",
        proxy_client_key_file=f"{PKI}/front-proxy.key",
        enable_admission_plugins="NodeRestriction",
        audit_policy_file=f"{NODE_DIR}/audit-policy.json",
        audit_log_path=f"{NODE_DIR}/{AUDIT_LOG}",
        profiling=False,
    )


# -- objects that make a bare API server a usable cluster --------------------------------------------------------


def bootstrap_objects() -> list[tuple[str, dict[str, Any]]]:
    """(collection path, object) pairs: the rights of DNS and provisioner, and the default StorageClass."""
    rbac = "rbac.authorization.k8s.io"
    read = ["get", "list", "watch"]
    dns_rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": read},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
    ]
    provisioner_rules = [
        {"apiGroups": [""], "resources": ["persistentvolumes"], "verbs": [*read, "create", "delete"]},
        {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": read},
    ]
    objects: list[tuple[str, dict[str, Any]]] = []
    roles: list[tuple[User, list[dict[str, Any]]]] = [(DNS, dns_rules), (PROVISIONER, provisioner_rules)]
    make: Callable[[str, str, dict[str, Any]], dict[str, Any]] = lambda kind, name, rest: {
        "apiVersion": f"{rbac}/v1",
        "kind": kind,
        "metadata": {"name": name},
        **rest,
    }
    for user, rules in roles:
        subject = {"kind": "User", "name": user.user, "apiGroup": rbac}
        reference = {"kind": "ClusterRole", "name": user.user, "apiGroup": rbac}
        binding = {"subjects": [subject], "roleRef": reference}
        objects += [
            (f"/apis/{rbac}/v1/clusterroles", make("ClusterRole", user.user, {"rules": rules})),
            (f"/apis/{rbac}/v1/clusterrolebindings", make("ClusterRoleBinding", user.user, binding)),
        ]
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": STORAGE_CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "localcluster/hostpath",
        "volumeBindingMode": "Immediate",
    }
    return [*objects, ("/apis/storage.k8s.io/v1/storageclasses", storage_class)]


def write_files(folder: Path) -> None:
    """Write the configuration files and make the folders that the node binds or fills."""
    for name in ("pki", "logs", "var-lib", "var-log", "volumes", "volume-plugins", "sysctl"):
        (folder / name).mkdir(parents=True)
    for path, text in files().items():
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)

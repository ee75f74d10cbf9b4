"""A minimal Kubernetes API client: JSON over HTTPS with a bearer token, by the standard library alone."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class ApiError(Exception):
    """The API server refused a request. `status` is the HTTP status, the text is the server's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Requests as the user of a kubeconfig that `pki.create` wrote."""

    def __init__(self, kubeconfig: Path) -> None:
        content = json.loads(kubeconfig.read_text())
        cluster = content["clusters"][0]["cluster"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._url = cluster["server"]
        self._token = content["users"][0]["user"]["token"]
        # No proxy: the server is on this machine.
        handler = urllib.request.HTTPSHandler(context=ssl.create_default_context(cadata=authority))
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), handler)

    def request(self, method: str, path: str, body: Any = None) -> str:
        """The answer's text. Raises `ApiError` for a refusal and `OSError` where no server answers."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=10) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, f"{method} {path}: {error.code} {error.read().decode()[:500]}") from error

    def get(self, path: str) -> Any:
        return json.loads(self.request("GET", path))

    def create(self, collection: str, body: Any) -> None:
        """Create an object; one that exists already is left as it is."""
        try:
            self.request("POST", collection, body)
        except ApiError as error:
            if error.status != 409:
                raise

    def delete(self, path: str) -> None:
        try:
            self.request("DELETE", path)
        except ApiError as error:
            if error.status != 404:
                raise

    def ready(self) -> bool:
        """Whether the API server says that it is ready; False while it is starting."""
        try:
            return self.request("GET", "/readyz") == "ok"
        except (ApiError, OSError):
            return False

"""A fake API server, for faults only: it answers each request with the next of a list of faults, then well.

Everything that a real API server can be made to show is tested with a real one.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration
from manthanquant_operator.cluster import Cluster


@dataclass(frozen=True)
class Fault:
    """An answer that a client must survive. `status` 0 closes the connection without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"kind":"Status","reason":"Fault","message":"made to fail"}'


@dataclass
class FaultyApi:
    """Objects by path, and the faults that come first."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)  # method, path with query, body

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.requests]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.text()
        self.requests.append((request.method, request.path_qs, json.loads(body) if body else None))
        if self.faults:
            fault = self.faults.pop(0)
            if not fault.status:
                assert request.transport is not None
                request.transport.close()
            return web.Response(status=fault.status or 500, headers=fault.headers, text=fault.body)
        if request.method == "GET":
            found = self.objects.get(request.path)
            if found is None:
                return web.json_response({"reason": "NotFound", "message": f"{request.path} not found"}, status=404)
            return web.json_response(found)
        path = request.path.removesuffix("/status")
        if request.method in ("PATCH", "PUT"):
            name = path.rsplit("/", 1)[1]
            metadata = {"name": name, "uid": f"uid-{name}", **self.objects.get(path, {}).get("metadata", {})}
            sent = json.loads(body)
            merged = {**self.objects.get(path, {}), **sent, "metadata": {**sent.get("metadata", {}), **metadata}}
            self.objects[path] = merged
            return web.json_response(merged)
        return web.json_response({"metadata": {"name": "made"}}, status=201)


async def with_faulty_api(api: FaultyApi, use: Callable[[Cluster], Awaitable[None]]) -> None:
    """Runs `use` with the operator's own client, over HTTP, against the fake."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        async with ApiClient(Configuration(host=f"http://127.0.0.1:{port}")) as client:
            await use(Cluster(client, "test"))
    finally:
        await runner.cleanup()

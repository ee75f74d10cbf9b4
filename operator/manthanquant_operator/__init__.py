"""The Kubernetes operator: a `QuantizedModel` becomes a server whose KV cache is compressed.

Layers, each importing only those above it (`pyproject.toml` has the exact order, and `make lint` checks it):

* `api`, `crd`, `names`, `settings`, `errors`: the resource, its definition, its names, the admin's settings.
* `source`, `plan`, `workload`, `service`, `storage`, `policy`, `children`: spec -> Kubernetes objects. Pure.
* `facts`, `diagnosis`, `conditions`, `telemetry`, `status`: what the cluster says -> status. Pure.
* `cluster`, `scraper`, `workqueue`, `lease`, `reconcile`, `handlers`, `app`: the only code that talks to the cluster.
"""

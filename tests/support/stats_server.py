"""A stand-in for the serving pods' statistics route: one file per pod address.

`python -m support.stats_server FOLDER` answers `GET /manthanquant/stats` on every local address with the content of
`FOLDER/<address>.json`, and with 503 where there is no such file. It needs a network of its own: the port is fixed.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from manthanquant.contract import HTTP_PORT, STATS_PATH


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        path = self.folder / f"{self.connection.getsockname()[0]}.json"
        found = self.path == STATS_PATH and path.exists()
        body = path.read_bytes() if found else b""
        self.send_response(200 if found else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    _Handler.folder = Path(sys.argv[1])
    ThreadingHTTPServer(("0.0.0.0", HTTP_PORT), _Handler).serve_forever()

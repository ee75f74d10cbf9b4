"""The launcher as a process: refusals, a served request, statistics, metrics, the log line, and a stop that drains."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import small_model

from manthanquant import capacity, contract
from manthanquant.vllm_plugin import ENDPOINT_PLUGIN, PLUGIN

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
START_SECONDS = 600
CACHE_BYTES = 1 << 28


def environment(tmp_path: Path) -> dict[str, str]:
    """For a checkout that is not installed: entry points in a directory of their own, as an installation has them."""
    info = tmp_path / "site" / "manthanquant-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: manthanquant\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{PLUGIN} = manthanquant.vllm_plugin:register\n"
        f"[vllm.endpoint_plugins]\n{ENDPOINT_PLUGIN} = manthanquant.vllm_plugin.endpoint:stats_endpoint\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MANTHANQUANT_", "VLLM_"))}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return environ | {"PYTHONPATH": f"{ROOT}:{info.parent}", "HF_HUB_OFFLINE": "1"}


class Server:
    """A running launcher."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = tmp_path / "server.log"
        command = [sys.executable, "-m", "manthanquant.serve", "serve", str(small_model())]
        own = [f"--port={self.port}", "--served-model-name=small", "--enforce-eager", "--max-model-len=1024"]
        own += [f"--kv-cache-memory-bytes={CACHE_BYTES}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *own, *flags], env=environment(tmp_path), stdout=log, stderr=subprocess.STDOUT
            )

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def complete(self, prompt: str, tokens: int) -> dict[str, Any]:
        body = {"model": "small", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return dict(json.loads(answer.read()))

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get(contract.HEALTH_PATH)
                return
            except OSError:
                time.sleep(1)
        raise AssertionError(f"not ready after {START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def stats(self) -> contract.Stats:
        return contract.Stats.from_json(self.get(contract.STATS_PATH))

    def stats_after(self, generated: int) -> contract.Stats:
        """Statistics that know of as many generated tokens; the workers are polled."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                stats = self.stats()
                if stats.load is not None and (stats.load.generated_tokens or 0) >= generated and stats.writes.calls:
                    return stats
            except urllib.error.HTTPError as error:
                assert error.code == 503  # not polled yet
            time.sleep(1)
        raise AssertionError(f"the statistics never showed {generated} tokens: {self.get(contract.STATS_PATH)}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    running = Server(root, f"--cache-dir={root / 'cache'}", "--kv-format=mq3", "--calibration=off")
    try:
        running.wait()
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def test_it_answers_and_counts(server: Server) -> None:
    answer = server.complete("The capital of France is", 8)
    assert answer["usage"]["completion_tokens"] == 8
    assert "Paris" in answer["choices"][0]["text"]
    stats = server.stats_after(8)
    assert stats.model == "small"
    assert stats.cache.format == "k42v3" and stats.cache.mode == "compressed"
    assert stats.cache.compression_ratio == pytest.approx(4.923)
    assert (stats.cache.capacity_tokens or 0) * 4680 == pytest.approx(CACHE_BYTES, rel=0.02)
    pool = capacity.slots_needed(contract.CPU_MAX_REQUESTS, 128, 4) * 30 * capacity.slot_bytes(3, 64)
    assert stats.cache.hot_pool_bytes == pool  # for the few requests that a CPU runs at once by default
    assert stats.writes.errors == 0
    assert stats.writes.key_cosine is not None and 0.9 < stats.writes.key_cosine < 1
    assert stats.calibration == contract.CalibrationReport("hadamard", "Off")
    assert stats.hot is not None and stats.hot.pages_in_use > 0


def test_the_same_figures_are_in_the_engines_metrics(server: Server) -> None:
    server.complete("One, two,", 4)
    calls = server.stats_after(4).writes.calls
    lines = dict(line.rsplit(" ", 1) for line in server.get(contract.METRICS_PATH).splitlines() if line[0] != "#")
    assert float(lines["manthanquant_writes_calls_total"]) >= calls > 0
    assert float(lines["manthanquant_cache_compression_ratio"]) == pytest.approx(4.923)
    assert any(name.startswith("vllm:") for name in lines)


def test_a_stop_lets_running_requests_finish(server: Server) -> None:
    """The last test of this server: it ends it."""
    answers: list[dict[str, Any]] = []
    request = threading.Thread(target=lambda: answers.append(server.complete("A long story:", 60)))
    before = server.stats().writes.calls
    request.start()
    while server.stats().writes.calls == before:  # until it runs
        time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    request.join(200)
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [60]
    server.process.wait(120)
    assert "[ManthanQuant pid=" in server.log.read_text()


def test_a_flag_that_vllm_does_not_know_is_one_line_before_anything_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "manthanquant.serve", "serve", str(small_model()), "--bogus-flag=3"]
    done = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=START_SECONDS
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "manthanquant serve: unrecognized arguments: --bogus-flag=3"
    assert "Traceback" not in done.stderr

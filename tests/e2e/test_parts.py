"""The demo's parts that need no cluster."""

from __future__ import annotations

import time

import pytest
from e2e import demo
from e2e.steps import Steps
from e2e.target import DemoError, current_context, wait_for


def test_the_current_context_says_which_images_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPERATOR_IMAGE", "registry/operator:1")
    monkeypatch.delenv("SERVER_IMAGE", raising=False)
    with pytest.raises(DemoError, match=r"--target operator(.|\n)*--target server-cpu(.|\n)*SERVER_IMAGE="):
        current_context()
    monkeypatch.setenv("SERVER_IMAGE", "registry/server:1")
    assert current_context().server_image == "registry/server:1"


def test_waiting_ends_with_what_did_not_happen() -> None:
    with pytest.raises(DemoError, match="the wonder did not happen"):
        wait_for("the wonder", 0, lambda: None)


def test_a_step_that_fails_is_in_the_summary() -> None:
    steps = Steps()
    with pytest.raises(ZeroDivisionError), steps.step("first"):
        time.sleep(0.01)
        raise ZeroDivisionError
    ((title, seconds, memory),) = steps.finished
    assert title == "first"
    assert seconds >= 0.01
    assert memory > 0
    assert "first" in steps.summary()


@pytest.mark.parametrize(
    ("status", "observed", "expected"), [("True", 2, True), ("True", 1, False), ("False", 2, False)]
)
def test_a_condition_counts_for_the_spec_as_it_is(status: str, observed: int, expected: bool) -> None:
    condition = {"type": "Ready", "status": status, "observedGeneration": observed}
    found = {"metadata": {"generation": 2}, "status": {"conditions": [condition]}}
    assert demo.is_true(found, "Ready") is expected
    assert not demo.is_true(found, "Other")

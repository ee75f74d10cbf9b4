"""Pods' facts -> what fails. The cluster tests go through the same cases with a real API server."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from manthanquant_operator import diagnosis
from manthanquant_operator.diagnosis import Failure
from manthanquant_operator.facts import ContainerFacts, PodFacts, Termination

from manthanquant.contract import PrepareError, PrepareReport

POD = PodFacts("p", "u", "server", "2026-01-01T00:00:00Z", "n", "", "Pending", "", "", False, False, "", (), ())
PREPARE = ContainerFacts("prepare", "i:1", False, False, 0)
SERVER = ContainerFacts("server", "i:1", False, False, 0)
DONE = dataclasses.replace(PREPARE, ready=True, terminated=Termination("Completed", 0, ""))


def _pod(init: ContainerFacts | None = None, server: ContainerFacts | None = None, **more: Any) -> PodFacts:
    return dataclasses.replace(POD, init=(init,) if init else (), containers=(server,) if server else (), **more)


def _prepare(**more: Any) -> PodFacts:
    return _pod(dataclasses.replace(PREPARE, **more))


def _server(**more: Any) -> PodFacts:
    return _pod(DONE, dataclasses.replace(SERVER, **more))


HEALTHY = [
    POD,
    _prepare(running=True),
    _prepare(waiting_reason="PodInitializing"),
    _server(running=True),
    _server(running=True, ready=True),
    _server(running=True, ready=True, restarts=1, last=Termination("OOMKilled", 137, "")),
    _server(running=True, last=Termination("Completed", 0, "")),
    dataclasses.replace(_prepare(waiting_reason="ErrImagePull"), terminating=True),
    dataclasses.replace(_server(running=True, ready=True), phase="Running", unschedulable="an old message"),
]


@pytest.mark.parametrize("pod", HEALTHY)
def test_what_is_under_way_is_no_failure(pod: PodFacts) -> None:
    assert diagnosis.diagnose(pod) is None


FAILING = [
    (
        _prepare(waiting_reason="ErrImagePull", waiting_message="not found"),
        "ImagePullFailed",
        "cannot pull i:1: not found",
    ),
    (_prepare(waiting_reason="ImagePullBackOff"), "ImagePullFailed", "ImagePullBackOff"),
    (_prepare(waiting_reason="InvalidImageName"), "ImagePullFailed", "InvalidImageName"),
    (
        _server(waiting_reason="CreateContainerConfigError", waiting_message="no key"),
        "CreateContainerConfigError",
        "no key",
    ),
    (_prepare(terminated=Termination("Error", 2, "words")), "ContainerFailed", "exit code 2 (Error): words"),
    (_prepare(terminated=Termination("Error", 2, "")), "ContainerFailed", "it left no message; see its log"),
    (_prepare(running=True, last=Termination("Error", 1, "first")), "ContainerFailed", "first"),
    (_server(terminated=Termination("OOMKilled", 137, "")), "OOMKilled", "raise spec.resources.memory"),
    (_server(waiting_reason="CrashLoopBackOff", last=Termination("Completed", 0, "bye")), "ContainerFailed", "bye"),
    (_server(restarts=7, running=True, last=Termination("Error", 1, "x")), "ContainerFailed", "(Error, 7 restarts)"),
    (
        dataclasses.replace(POD, unschedulable="0/1 nodes: Insufficient nvidia.com/gpu"),
        "Unschedulable",
        "Insufficient nvidia",
    ),
    (dataclasses.replace(POD, phase="Failed", reason="Evicted", message="disk"), "Evicted", "pod p failed: disk"),
    (dataclasses.replace(POD, phase="Failed"), "PodFailed", "no reason given"),
]


@pytest.mark.parametrize(("pod", "reason", "words"), FAILING)
def test_a_failure_has_a_reason_and_words(pod: PodFacts, reason: str, words: str) -> None:
    found = diagnosis.diagnose(pod)
    assert found and found.reason == reason
    assert words in found.message and "pod p" in found.message


@pytest.mark.parametrize("field", ["model.uri", "spec.model.uri"])
def test_the_reports_own_error_wins_and_names_the_specs_field(field: str) -> None:
    error = PrepareError("ModelNotFound", "nothing at /models: correct the path", field)
    end = Termination("Error", 1, PrepareReport(error=error).to_json())
    found = diagnosis.diagnose(_prepare(terminated=end))
    assert found == Failure(
        "ModelNotFound",
        "pod p, container prepare ended with exit code 1 (Error): spec.model.uri: nothing at /models: correct the path",
        "prepare",
    )


def test_a_long_message_is_cut_to_its_end() -> None:
    found = diagnosis.diagnose(_server(terminated=Termination("Error", 1, "x" * 4000 + "the cause")))
    assert found and found.message.endswith("the cause") and len(found.message) < diagnosis.MESSAGE_LIMIT + 200


def test_the_newest_failing_pod_is_told() -> None:
    old = dataclasses.replace(_prepare(terminated=Termination("Error", 1, "old")), created="2026-01-01T00:00:00Z")
    new = dataclasses.replace(_prepare(terminated=Termination("Error", 1, "new")), created="2026-01-02T00:00:00Z")
    found = diagnosis.worst([new, POD, old])
    assert found and found.message.endswith("new")
    assert diagnosis.worst([POD]) is None


def test_a_report_is_read_from_either_end_and_broken_ones_are_none() -> None:
    report = PrepareReport(model_path="/models")
    good = Termination("Completed", 0, report.to_json())
    assert diagnosis.report(_prepare(terminated=good)) == report
    assert diagnosis.report(_prepare(running=True, last=good)) == report
    assert diagnosis.report(_prepare(terminated=Termination("Error", 1, "Traceback"))) is None
    assert diagnosis.report(_prepare(terminated=Termination("Error", 1, '{"schema":99}'))) is None
    assert diagnosis.report(POD) is None


def test_progress_says_what_each_pod_does() -> None:
    pods = [
        dataclasses.replace(_prepare(running=True), name="a"),
        dataclasses.replace(_server(running=True), name="b"),
        dataclasses.replace(_prepare(waiting_reason="PodInitializing"), name="c"),
        dataclasses.replace(POD, name="d"),
        dataclasses.replace(POD, name="e", ready=True),
    ]
    assert diagnosis.progress(pods) == (
        "pod a: container prepare is running; pod b: container server is starting; "
        "pod c: container prepare waits (PodInitializing); and 1 more"
    )
    assert diagnosis.progress([dataclasses.replace(POD, node="")]) == "pod p: waiting for the scheduler"


def test_a_silent_pod_is_bound_and_says_nothing() -> None:
    assert diagnosis.is_silent(POD)
    assert diagnosis.is_silent(_prepare(waiting_reason="PodInitializing"))
    assert not diagnosis.is_silent(dataclasses.replace(POD, node=""))
    assert not diagnosis.is_silent(_prepare(running=True))
    assert not diagnosis.is_silent(_prepare(waiting_reason="ErrImagePull"))
    assert not diagnosis.is_silent(dataclasses.replace(POD, phase="Running"))

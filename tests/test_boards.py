"""What TensorBoard and Prometheus are told about a run, read back from files and from Ray's metrics port."""

from __future__ import annotations

import math
import re
import struct
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seuf_ray.stages.boards import GAUGES, TAGS, TensorBoard, readings
from seuf_ray.unlearning import Progress

RECORD = Progress(
    20,
    {
        "forget_accuracy": 0.25,
        "utility": math.nan,
        "loss/forget": -3.5,
        "loss/total": -3.0,
        "grad_norm": 1.5,
        "overlap_top1/forget/1": 0.5,
        "overlap_top1/forget/2": 1.0,
        "overlap_top1/retain/1": 1.0,
        "overlap_topk/forget/1": 0.0,
        "kl/forget/1": 0.25,
        "step/kl/1": 9.0,
    },
)


def events(folder: Path) -> Iterator[Any]:
    """Every event, in the order in which TensorBoard reads files: (length, crc, message, crc) one after another."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> points, as TensorBoard shows them: a session that starts at a step hides what was there from it on."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            found = {tag: [p for p in points if p[0] < event.step] for tag, points in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_every_metric_is_a_scalar_under_its_own_name(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        board.show(RECORD)
    assert shown(tmp_path) == {
        name: [(20, value)] for name, value in RECORD.metrics.items() if math.isfinite(value)
    }


def test_without_a_record_there_is_no_folder(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "board"):
        pass
    assert not (tmp_path / "board").exists()


def test_steps_that_are_taken_again_are_shown_once(tmp_path: Path) -> None:
    """A worker dies after step 4 and goes on from 2, so 4 comes twice; the driver dies, and resumes with 6 again."""
    for session in ([(0, 1.0), (2, 2.0), (4, 3.0), (4, 3.5), (6, 4.0)], [(6, 4.5), (8, 5.0)]):
        with TensorBoard(tmp_path) as board:
            for step, value in session:
                board.show(Progress(step, {"utility": value}))
    assert shown(tmp_path) == {"utility": [(0, 1.0), (2, 2.0), (4, 3.5), (6, 4.5), (8, 5.0)]}
    assert len(list(tmp_path.iterdir())) == 3


def test_gauges_read_a_record() -> None:
    """Means are over layers; the figures of steps and top-k overlap have no gauge."""
    found = {(name, *tags.values()): value for name, tags, value in readings(RECORD)}
    assert math.isnan(found.pop(("utility",)))
    assert math.isnan(found.pop(("routing_kl", "retain")))
    assert found == {
        ("step",): 20,
        ("forget_accuracy",): 0.25,
        ("loss", "forget"): -3.5,
        ("loss", "total"): -3.0,
        ("gradient_norm",): 1.5,
        ("routing_overlap", "forget"): 0.75,
        ("routing_overlap", "retain"): 1.0,
        ("routing_kl", "forget"): 0.25,
    }
    for name, tags, _ in readings(RECORD):
        assert name in GAUGES and ("run", *tags) == TAGS.get(name, ("run",))


def exported(wanted: str, seconds: float) -> str:
    """What the node's metrics port serves, once it has `wanted`."""
    import ray

    node, deadline = ray.nodes()[0], time.monotonic() + seconds
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = ""
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(address, timeout=5).read().decode()
        if wanted in text:
            return text
        time.sleep(0.5)
    raise AssertionError(f"{wanted} is not exported: {len(text)} characters")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_prometheus_sees_the_last_record_of_a_worker() -> None:
    """Through Ray's real exporter, which sends every ten seconds."""
    import ray

    from seuf_ray.stages.boards import Gauges

    @ray.remote(num_cpus=0)
    class Worker:
        def work(self) -> None:
            self.gauges = Gauges("my run")
            self.gauges.show(Progress(10, {"forget_accuracy": 0.75}))
            self.gauges.show(RECORD)

    worker = Worker.remote()
    ray.get(worker.work.remote())
    text = exported("ray_seuf_step", 60)
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_seuf_"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            assert tags["run"] == "my run"
            found[name, tags.get("term") or tags.get("tokens")] = float(value)
    ray.kill(worker)
    expected = {
        (f"ray_seuf_{name}", next(iter(tags.values()), None)): value
        for name, tags, value in readings(RECORD)
        if math.isfinite(value)
    }
    assert found == expected

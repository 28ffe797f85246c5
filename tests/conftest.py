"""What all tests share: an environment that keeps to itself, one real local Ray, and pairs of gloo processes.

The environment is set while pytest loads this file, before anything imports ray or torch; child processes inherit it.
"""

from __future__ import annotations

import os
import runpy
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
# Short, because Ray puts sockets under it and their paths may have about a hundred characters.
TEMP = Path(tempfile.mkdtemp(prefix="seuf"))


def _environment() -> dict[str, str]:
    token = TEMP / "token"  # Ray would write one into HOME
    token.write_text(secrets.token_hex(32))
    return {
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # what ray.train.report waits for; 2 s by default
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_worker_niceness": "0",  # 15 by default: beside anything else that computes, workers would hardly run
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin make each other ten times slower on a busy machine
        "TOKENIZERS_PARALLELISM": "false",
        # Workers of Ray find functions that test modules define.
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")])
        ),
    }


os.environ.update(_environment())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that kill processes come first: where files run side by side, the end would wait for these long ones."""
    long = {item.path for item in items if item.get_closest_marker("chaos")}
    items.sort(key=lambda item: item.path not in long)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the token and whatever Ray left beside it."""
    shutil.rmtree(TEMP, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One real Ray on this machine, with room for four processes, for all tests that ask for it."""
    import ray

    ray.init(
        address="local",  # never a cluster that happens to run here
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=150 << 20,
        log_to_driver=False,
        _temp_dir=str(TEMP / "ray"),
    )
    yield
    ray.shutdown()


@pytest.fixture
def ray_address(ray_session: None) -> str:
    """Where drivers of their own find the session: what they need not start saves seconds."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def run_job(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`run_job("jobs/x.py", "x.toml", "a.b=1")`: the script in this process, whose Ray session and imports it uses."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own
        runpy.run_path(str(TESTS.parent / script), run_name="__main__")

    return run


@pytest.fixture
def kill_driver(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`kill_driver(command, is_time)`: a script in its own process on the session's Ray, SIGKILL once `is_time()`."""

    def run(command: list[str], is_time: Callable[[], object], seconds: float = 200) -> None:
        said, deadline = tmp_path_factory.mktemp("driver") / "said.txt", time.monotonic() + seconds
        with said.open("w") as out:
            driver = subprocess.Popen(
                [sys.executable, *command],
                cwd=TESTS.parent,
                env={**os.environ, "RAY_ADDRESS": ray_address},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            while not is_time():
                assert driver.poll() is None and time.monotonic() < deadline, said.read_text()
                time.sleep(0.05)
        finally:
            driver.kill()
            driver.wait()
        assert driver.returncode == -signal.SIGKILL, said.read_text()

    return run


@pytest.fixture
def two_processes() -> Callable[..., list[Any]]:
    """`two_processes(function, *args)`: what a module-level function returns on each of two gloo processes."""
    import distributed

    return lambda function, *args: distributed.run(function, 2, *args)

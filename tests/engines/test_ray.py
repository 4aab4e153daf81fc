"""The Ray engine: a private cluster, a lost actor, and a cluster of two nodes on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prerank_tools.run.job import RunOptions, run
from tests.toy import Copy, Dying, Number, tree, write_items

pytestmark = pytest.mark.ray
RAY = RunOptions(workers=2, threads=1, engine="ray")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_ray_writes_the_bytes_of_one_process(tmp_path: Path, cluster: None) -> None:
    items = write_items(tmp_path / "items.parquet", 40)
    run(Number(items), tmp_path / "one", RunOptions(workers=1, threads=1))
    run(Number(items), tmp_path / "ray", RAY)
    assert tree(tmp_path / "one", below="data") == tree(tmp_path / "ray", below="data")


def test_the_shard_of_a_killed_actor_is_taken_by_another(tmp_path: Path, cluster: None) -> None:
    items = write_items(tmp_path / "items.parquet", 40)
    run(Copy(items), tmp_path / "one", RunOptions(workers=1, threads=1))
    assert run(Dying(items, marker=tmp_path / "marker"), tmp_path / "ray", RAY).status == "done"
    assert (tmp_path / "marker").exists()
    assert tree(tmp_path / "one", below="data") == tree(tmp_path / "ray", below="data")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_cluster_of_two_nodes_embeds_items(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    items = tmp_path / "items"
    for part in range(4):
        write_items(items / f"part-{part}.parquet", 50, first=50 * part)
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    started = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    head = [*ray, "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    second = [*ray, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1"]
    try:
        for command in (head, second):
            subprocess.run(command, env=started, check=True, capture_output=True)
        count = (
            "import ray; ray.init(log_to_driver=False); "
            "print(sum(node['Alive'] for node in ray.nodes()), ray.cluster_resources()['CPU'])"
        )
        told = subprocess.run(
            [sys.executable, "-c", count], env=environment, check=True, capture_output=True, text=True
        )
        assert told.stdout.split() == ["2", "2.0"]
        for engine, out in (("local", "one"), ("ray", "two")):
            command = ["embed", "items", str(items), "-o", str(tmp_path / out), "--threads", "1"]
            subprocess.run(
                [sys.executable, "-m", "prerank_cli", *command, "--engine", engine, "--workers", "2"],
                env=environment,
                check=True,
                capture_output=True,
            )
        assert tree(tmp_path / "one", below="data") == tree(tmp_path / "two", below="data")
    finally:
        subprocess.run([*ray, "stop", "--force"], env=started, capture_output=True)

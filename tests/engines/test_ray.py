"""The Ray engine: a private cluster, a lost actor, and a cluster of two nodes on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prerank_tools.run.job import RunOptions, run
from tests.toy import Copy, Dying, Number, tree, write_items

pytestmark = pytest.mark.ray
RAY = RunOptions(workers=2, threads=1, engine="ray")
ROOT = Path(__file__).parent.parent.parent
# Read by every process at its start: an actor is a fresh interpreter that meets the real command.
WAITING = """
import os, sys, time
from pathlib import Path
if any("default_worker.py" in word for word in sys.orig_argv):
    from prerank_tools.encoders.stage import EmbedItems
    process = EmbedItems.process
    def waiting(self, shard, ctx):
        Path(os.environ["WAITING_FOLDER"], f"actor{os.getpid()}").touch()
        time.sleep(300)
    EmbedItems.process = waiting
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    paths = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), paths])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.environ["PYTHONPATH"] = paths


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


@contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, str]]:
    """Two raylets on loopback, started as an operator does; the environment of a driver that joins them."""
    address = f"127.0.0.1:{free_port()}"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_ADDRESS": address}
    started = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    here = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes = []
    try:
        for role in (["--head", f"--port={address.split(':')[1]}", *here], [f"--address={address}"]):
            with (folder / f"node-{len(nodes)}.log").open("wb") as told:
                nodes.append(
                    subprocess.Popen(
                        [*start, *role], env=started, stdout=told, stderr=told, start_new_session=True
                    )
                )
            wait_for_nodes(len(nodes), environment)
        yield environment
    finally:
        # Ours alone: `ray stop` would end every cluster of the machine.
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)


def wait_for_nodes(wanted: int, environment: dict[str, str]) -> None:
    """Until the cluster has as many nodes, of one CPU each."""
    count = (
        "import ray; ray.init(log_to_driver=False); "
        "print(sum(node['Alive'] for node in ray.nodes()), ray.cluster_resources().get('CPU'))"
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        told = subprocess.run(
            [sys.executable, "-c", count], env=environment, capture_output=True, text=True, check=False
        )
        if told.stdout.split() == [str(wanted), f"{wanted}.0"]:
            return
        time.sleep(1)
    pytest.fail(f"no cluster of {wanted} nodes: {told.stdout} {told.stderr}")


def embed(
    items: Path, out: Path, engine: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    line = ["embed", "items", str(items), "-o", str(out), "--threads", "1"]
    return subprocess.run(
        [sys.executable, "-m", "prerank_cli", *line, "--engine", engine, "--workers", "2"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )


def test_a_cluster_of_two_nodes_embeds_items(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    items = tmp_path / "items"
    for part in range(4):
        write_items(items / f"part-{part}.parquet", 50, first=50 * part)
    # Not below tmp_path: the name of a socket has room for 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray") as short, two_nodes(Path(short)) as environment:
        embed(items, tmp_path / "one", "local", environment)
        embed(items, tmp_path / "two", "ray", environment)
    assert tree(tmp_path / "one", below="data") == tree(tmp_path / "two", below="data")


def test_sigterm_under_ray_leaves_with_143(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    items = tmp_path / "items"
    for part in range(4):
        write_items(items / f"part-{part}.parquet", 20, first=20 * part)
    (tmp_path / "sitecustomize.py").write_text(WAITING)
    line = ["embed", "items", str(items), "-o", str(tmp_path / "emb"), "--engine", "ray", "--workers", "2"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    job = subprocess.Popen(
        [sys.executable, "-m", "prerank_cli", *line, "--threads", "1"],
        env={**os.environ, "PYTHONPATH": paths, "WAITING_FOLDER": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("actor*")):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    job.terminate()
    _, errors = job.communicate(timeout=90)
    assert job.returncode == 143, errors
    assert errors.splitlines()[-1] == "hint: run the same line again: finished shards stay"
    assert not (tmp_path / "emb").exists() and (tmp_path / ".emb.partial/plan.json").exists()
    actors = [int(path.name.removeprefix("actor")) for path in tmp_path.glob("actor*")]
    while any(Path(f"/proc/{pid}").exists() for pid in actors):
        assert time.monotonic() < deadline
        time.sleep(0.1)

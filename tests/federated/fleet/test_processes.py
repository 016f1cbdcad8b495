"""A fleet of real processes on 127.0.0.1: TLS, keys, failures, kills. About four minutes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.federated.fleet.__main__ import main as command

pytest.importorskip("flwr")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        installation.unsupported_platform() is not None, reason="compares with TFF, on Linux x86-64"
    ),
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="needs openssl and ssh-keygen",
    ),
]
BIN = Path(sys.executable).parent


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Fleet:
    """The processes of a fleet in a folder, started with the commands of its README."""

    def __init__(self, folder, home):
        self.folder, self.port = folder, free_port()
        self.processes, self.ports = [], []
        home.mkdir()
        self.environment = {
            **os.environ, "FLWR_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"),
            "FLWR_TELEMETRY_ENABLED": "0", "TF_CPP_MIN_LOG_LEVEL": "3",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "fleet"\n[superlink.fleet]\n'
            f'address = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder}/certificates/ca.pem"\n'
        )

    def start(self, name, *arguments):
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(map(str, arguments)), cwd=self.folder, env=self.environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def flwr(self, *arguments, timeout=240):
        done = subprocess.run(
            [BIN / "flwr", *arguments], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def superlink(self):
        process = self.start(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", self.port,
            "--database", "superlink.db", "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--ssl-ca-certfile", "certificates/ca.pem", "--ssl-certfile", "certificates/server.pem",
            "--ssl-keyfile", "certificates/server.key",
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return process
            time.sleep(0.2)
        raise AssertionError(self.log("superlink"))

    def node(self, number, key=None, tls=("--root-certificates", "certificates/ca.pem")):
        self.ports.append(free_port())
        key = () if key == "" else ("--auth-supernode-private-key", key or f"keys/node{number}")
        return self.start(
            f"node{number}", "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", *tls,
            *key, "--port", self.ports[-1],
            "--node-config", f'data="{self.folder}/{number}.npz" partition-id={number}',
        )  # fmt: skip

    def run(self):
        """Starts a run and follows it; returns what was printed and the status."""
        printed = self.flwr("run", ".", "fleet", "--stream")
        listed = self.flwr("list", "fleet", "--format", "json")
        return printed, listed

    def end(self):
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        for port in self.ports:  # what Flower leaves behind of a SuperNode that was killed
            subprocess.run(["pkill", "-KILL", "-f", f"runtime-api-address.*:{port}"], check=False)


@pytest.fixture(scope="module")
def clients():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x = x[:240].reshape(-1, 64).astype("float32") / 255
    return dict(enumerate(lp.partition((x, y[:240]), clients=2, alpha=1.0, seed=0).values()))


@pytest.fixture
def fleet(tmp_path, clients, mlp):
    keras.utils.set_random_seed(0)
    model = lp.transfer_model(
        mlp((16,)), 10, pretrained=False, pooling=None, trainable="all", optimizer="sgd",
        learning_rate=0.1,
    )  # fmt: skip
    model.save(tmp_path / "model.keras")
    folder = tmp_path / "fleet"
    command(["init", str(folder), "--model", str(tmp_path / "model.keras"), "--rounds", "3"])
    subprocess.run(
        [folder / "certificates.sh", "127.0.0.1", "node0", "node1", "stranger"],
        check=True, capture_output=True,
    )  # fmt: skip
    for number, (x, y) in clients.items():
        np.savez(folder / f"{number}.npz", x=x, y=y)
    made = Fleet(folder, tmp_path / "home")
    made.superlink()
    for number in clients:
        assert "registered" in made.flwr("supernode", "register", f"keys/node{number}.pub", "fleet")
    yield made
    made.end()


def expected(folder, clients, rounds):
    model = keras.models.load_model(folder / "model.keras")
    lp.FederatedAveraging(model).fit(clients, rounds=rounds, verbose=0)
    return model.get_weights()


def restart_node(fleet, number):
    """Starts a killed node again, as a service would: Flower takes it after some heartbeats."""
    for _ in range(20):
        (fleet.folder / f"node{number}.log").unlink()
        process = fleet.node(number)
        time.sleep(8)
        if "Failed to activate" not in fleet.log(f"node{number}"):
            return
        process.terminate()
        process.wait()
    raise AssertionError(fleet.log(f"node{number}"))


def node_processes():
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    lines = listed.stdout.splitlines()
    return [line for line in lines if "keras_lp.federated.fleet node" in line]


def test_a_fleet_with_tls_and_keys(fleet, clients):
    """Three rounds equal the simulation; strangers, other certificates and HTTP are refused."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=another",
         "-keyout", "certificates/other.key", "-out", "certificates/other.pem"],
        cwd=fleet.folder, check=True, capture_output=True,
    )  # fmt: skip
    fleet.node(7, "keys/stranger")
    fleet.node(8, "", tls=("--insecure",))
    fleet.node(9, "keys/node1", tls=("--root-certificates", "certificates/other.pem"))
    nodes = [fleet.node(number) for number in clients]
    printed, listed = fleet.run()
    assert "3 rounds are done" in printed, printed
    assert "Round 3/3" in printed
    assert "finished:completed" in listed
    found = keras.models.load_model(fleet.folder / "output" / "model.keras").get_weights()
    for ours, theirs in zip(found, expected(fleet.folder, clients, 3), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    history = json.loads((fleet.folder / "output" / "history.json").read_text())
    assert history["clients"] == [2, 2, 2]  # nobody else took part
    assert "Failed to activate SuperNode" in fleet.log("node7")
    for number in (7, 8, 9):
        assert "Received" not in fleet.log(f"node{number}")
    assert all(node.poll() is None for node in nodes)
    assert len(node_processes()) == 2  # they live on between messages
    fleet.end()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and node_processes():
        time.sleep(0.5)
    assert node_processes() == []


def test_a_run_whose_nodes_all_fail_ends_as_failed(fleet, clients):
    for number in clients:
        (fleet.folder / f"{number}.npz").unlink()
        fleet.node(number)
    printed, listed = fleet.run()
    assert "finished:failed" in listed
    assert "No node answered" in printed
    assert "FileNotFoundError; the log of the node has the details" in printed


def test_a_node_and_the_superlink_are_killed_and_the_run_goes_on(fleet, clients):
    text = (fleet.folder / "pyproject.toml").read_text()
    text = text.replace("rounds = 3", "rounds = 6").replace("deadline = 3600", "deadline = 15")
    (fleet.folder / "pyproject.toml").write_text(text)
    nodes = [fleet.node(number) for number in clients]
    run = fleet.start("run", "flwr", "run", ".", "fleet", "--stream")
    history = fleet.folder / "output" / "history.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        history.exists() and len(json.loads(history.read_text())["loss"]) >= 2
    ):
        time.sleep(0.2)
    superlink = fleet.processes[0]
    os.killpg(superlink.pid, signal.SIGKILL)
    superlink.wait()
    done = len(json.loads(history.read_text())["loss"])
    assert 2 <= done < 6
    run.terminate()
    time.sleep(1)
    subprocess.run(["pkill", "-KILL", "-f", f"flwr-serverapp.*{fleet.port}"], check=False)
    fleet.superlink()
    os.killpg(nodes[1].pid, signal.SIGKILL)
    restart_node(fleet, 1)
    printed, listed = fleet.run()
    assert "6 rounds are done" in printed, printed
    assert f"Round {done + 1}/6" in printed
    assert "Round 1/6" not in printed
    found = keras.models.load_model(fleet.folder / "output" / "model.keras").get_weights()
    for ours, theirs in zip(found, expected(fleet.folder, clients, 6), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert "finished:completed" in listed

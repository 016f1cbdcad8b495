"""Rounds over real HTTP: browsers, DeviceTrainers, intruders, kills."""

import io
import json
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request

import keras
import numpy as np
import pytest

import keras_lp as lp
from tests.web.conftest import digits_model, examples, opened, running

OPTIONS = {"learning_rate": 0.05, "batch_size": 32}


@pytest.fixture(scope="module")
def digits():
    return lp.load_dataset("digits", split="train", batch_size=-1)


@pytest.fixture
def small(mlp):
    """A small compiled model: 4 inputs, 3 classes."""
    return lp.transfer_model(
        mlp((5,), 4), 3, pooling=None, cache_features=False, optimizer="sgd", learning_rate=0.05
    )


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)


def head(model):
    """Copies of the weights that train."""
    layer = model.get_layer("predictions")
    return [layer.kernel.numpy().copy(), layer.bias.numpy().copy()]


def changed(server):
    """The weights of a round as a device would send them, with a small change."""
    weights = dict(np.load(server._rounds.weights_path()))
    return {
        name: value + np.float32(0.01) if value.dtype == np.float32 else value
        for name, value in weights.items()
    }


def packed(weights):
    file = io.BytesIO()
    np.savez(file, **weights)
    return file.getvalue()


def send(url, client, body, number=1, examples=10, **headers):
    """Sends an update; returns the status and the answer."""
    request = urllib.request.Request(
        f"{url}/update?round={number}&examples={examples}",
        data=body,
        headers={"Authorization": f"Bearer {client}", **headers},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_three_browsers_and_two_device_trainers_equal_federated_averaging(
    tmp_path, browser, digits_network, digits
):
    x, y = digits
    sizes = [12, 25, 18, 9, 30]
    ends = np.cumsum(sizes)
    clients = {
        i: (x[end - size : end].astype("float32"), y[end - size : end])
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }
    model = digits_model(digits_network)
    model.save(tmp_path / "start.keras")
    server = lp.phone_server(
        model, tmp_path / "server", clients_per_round=5, rounds=5, local_epochs=2,
        max_weight=None, **OPTIONS,
    )  # fmt: skip
    with running(server) as url:
        phones = [lp.PhoneClient(url) for _ in range(2)]
        trainers = [
            lp.DeviceTrainer(phone.download(tmp_path / f"{i}.tflite"))
            for i, phone in enumerate(phones)
        ]
        with (
            opened(browser, url) as a,
            opened(browser, url) as b,
            opened(browser, url) as c,
        ):
            pages = [a, b, c]
            for page, data in zip(pages, clients.values(), strict=False):
                page.evaluate(
                    """async examples => {
                        const {open} = await import('./runner.js');
                        const {Client} = await import('./federation.js');
                        const runner = await open('model.tflite');
                        window.mine = {examples, runner, client: await Client.join()};
                    }""",
                    examples(*data),
                )
            for number in range(1, 6):
                for page in pages:
                    sent = page.evaluate(
                        "mine.client.takePart(mine.runner, mine.examples, {shuffle: false})"
                    )
                    assert sent["round"] == number
                assert pages[0].evaluate("mine.client.takePart(mine.runner, mine.examples)") is None
                for i in (0, 1):
                    sent = phones[i].take_part(trainers[i], *clients[3 + i], shuffle=False)
                    assert sent["round"] == number
            assert phones[0].round()["finished"]
    twin = keras.models.load_model(tmp_path / "start.keras")
    lp.FederatedAveraging(twin, local_epochs=2, batch_size=None).fit(clients, rounds=5, verbose=0)
    moved = np.abs(head(model)[0]).max()
    assert moved > 1e-2  # the head started at 0
    for ours, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    saved = keras.models.load_model(tmp_path / "server" / "model.keras")
    for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert server.history["clients"] == [5] * 5
    assert server.rounds_done == 5


def test_taking_part_by_the_buttons_of_the_page(tmp_path, browser, digits_network):
    model = digits_model(digits_network)
    before = head(model)
    server = lp.phone_server(
        model, tmp_path, clients_per_round=1, rounds=2, title="Together", **OPTIONS
    )
    with running(server) as url, opened(browser, url) as page:
        assert page.locator("#join").is_disabled()
        box = page.locator("canvas.draw").bounding_box()
        page.mouse.move(box["x"] + 100, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 100, box["y"] + 200, steps=5)
        page.mouse.up()
        page.select_option("#label select", label="digit 1")
        page.click("#add")
        page.click("#join")
        page.get_by_text("All 2 rounds are done. This page has the result.").wait_for()
        weights = page.evaluate(
            """async () => {
                const {training} = await (await fetch('model.json')).json();
                const {kept} = await import('./store.js');
                const weights = Object.entries(await kept(training.model));
                return Object.fromEntries(weights.map(([k, v]) => [k, Array.from(v)]));
            }"""
        )
    assert server.finished
    assert np.abs(head(model)[0] - before[0]).max() > 1e-3
    kernel = next(v for name, v in weights.items() if name.endswith("kernel"))
    np.testing.assert_array_equal(np.float32(kernel), head(model)[0].ravel())


def test_a_page_that_closes_in_the_middle_costs_nothing(tmp_path, browser, digits_network, digits):
    x, y = digits
    server = lp.phone_server(
        digits_model(digits_network), tmp_path, clients_per_round=1, rounds=1, local_epochs=10_000,
        **OPTIONS,
    )  # fmt: skip
    with running(server) as url:
        with opened(browser, url) as page:
            page.evaluate(
                """async examples => {
                    const {open} = await import('./runner.js');
                    const {Client} = await import('./federation.js');
                    const [client, runner] = [await Client.join(), await open('model.tflite')];
                    client.takePart(runner, examples);  // not awaited
                }""",
                examples(x[:20].astype("float32"), y[:20]),
            )
            page.wait_for_timeout(300)
        client = lp.PhoneClient(url)
        assert client.round()["takes_part"]
        weights = changed(server)
        assert send(url, client.token, packed(weights)) == (200, {"round": 1})
        assert server.finished


def test_updates_that_must_not_count_are_refused(tmp_path, small, mlp):
    server = lp.phone_server(small, tmp_path / "a", clients_per_round=2, rounds=2, **OPTIONS)
    other = lp.transfer_model(mlp((5,), 4), 3, pooling=None, optimizer="sgd", learning_rate=0.05)
    others = lp.phone_server(other, tmp_path / "b", clients_per_round=2, rounds=2, **OPTIONS)
    foreign = packed(changed(others))
    others.close()
    good = changed(server)
    kernel = next(name for name in good if name.endswith("kernel"))
    start = small.get_weights()
    with running(server) as url:
        token = lp.PhoneClient(url).token
        cases = {
            "malformed": (b"PK not a file", 422, "cannot be read"),
            "empty": (b"", 422, "cannot be read"),
            "not finite": (packed({**good, kernel: good[kernel] * np.nan}), 422, "not finite"),
            "another model": (foreign, 422, "another model"),
            "another shape": (packed({**good, kernel: good[kernel][:2]}), 422, "shape"),
            "objects": (packed({**good, kernel: np.array([{}] * 3)}), 422, "cannot be read"),
            "missing weight": (packed({"version": good["version"]}), 422, "other weights"),
            "too large": (bytes(10**6), 413, "at most"),
        }
        for name, (body, status, reason) in cases.items():
            found, answer = send(url, token, body)
            assert (found, reason in answer["reason"]) == (status, True), (name, answer)
        stale = {**good, "version": good["version"] + np.int32([0] * 4 + [1] * 4)}
        assert send(url, token, packed(stale))[0] == 409
        assert "stale" in send(url, token, packed(good), number=2)[1]["reason"]
        assert send(url, "guess", packed(good))[0] == 401
        assert send(url, token, packed(good), examples="-1")[0] == 400
        assert send(url, token, packed(good), examples="9" * 13)[0] == 400
        # None of these counted, and the client may still send a good one, once.
        assert send(url, token, packed(good)) == (200, {"round": 1})
        found, answer = send(url, token, packed(good))
        assert (found, answer["reason"]) == (409, "it already sent an update in round 1")
        assert server.rounds_done == 0
        for before, now in zip(start, small.get_weights(), strict=True):
            np.testing.assert_array_equal(before, now)
        assert not list((tmp_path / "a" / "updates").glob("*.partial"))


def test_absurd_numbers_and_weights_move_the_model_only_within_the_limit(tmp_path, small):
    server = lp.phone_server(small, tmp_path, clients_per_round=4, rounds=1, **OPTIONS)
    start = head(small)[0]
    with running(server) as url:
        good = changed(server)
        kernel = next(name for name in good if name.endswith("kernel"))
        absurd = {**good, kernel: np.full_like(good[kernel], 1e30)}
        for weights, claimed in [(good, 10), (good, 10), (absurd, 10**9), (good, 10)]:
            token = lp.PhoneClient(url).token
            assert send(url, token, packed(weights), examples=claimed)[0] == 200
    # The claim counts as 100 of 130, and the change as ten times the norm of the others.
    assert server.history["limited"] == [1]
    norm = 0.01 * np.sqrt(sum(w.size for w in head(small)))
    assert np.linalg.norm(head(small)[0] - start) <= 10 * norm * (100 / 130) + norm


def test_a_client_that_asks_too_often_has_to_wait(tmp_path, small):
    options = {"requests_per_minute": 3, **OPTIONS}
    server = lp.phone_server(small, tmp_path, clients_per_round=1, rounds=1, **options)
    with running(server) as url:
        clients = [lp.PhoneClient(url) for _ in range(3)]
        with pytest.raises(ConnectionError, match="more than 3 requests") as error:
            lp.PhoneClient(url)
        assert error.value.status == 429
        for _ in range(3):
            clients[0].round()
        with pytest.raises(ConnectionError, match="status 429"):
            clients[0].round()
        clients[1].round()  # others are not affected


def test_only_known_tokens_may_take_part(tmp_path, small):
    server = lp.phone_server(
        small, tmp_path, clients_per_round=1, rounds=1, tokens=["for Ada", "for Bob"], **OPTIONS
    )
    with running(server) as url:
        with pytest.raises(ConnectionError, match="gives no tokens"):
            lp.PhoneClient(url)
        with pytest.raises(ConnectionError, match="status 401"):
            lp.PhoneClient(url, token="for Eve").round()
        assert lp.PhoneClient(url, token="for Bob").round()["takes_part"]
    # Tokens are not stored as they are.
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"for Bob" not in path.read_bytes(), path


def test_a_full_server_takes_no_more_clients(tmp_path, small):
    server = lp.phone_server(
        small, tmp_path, clients_per_round=1, rounds=1, max_clients=1, **OPTIONS
    )
    with running(server) as url:
        lp.PhoneClient(url)
        with pytest.raises(ConnectionError, match="all 1 places are taken"):
            lp.PhoneClient(url)


def test_a_round_ends_by_the_clock_with_what_came(tmp_path, small, data):
    server = lp.phone_server(
        small, tmp_path, clients_per_round=3, rounds=2, round_seconds=1.0, **OPTIONS
    )
    with running(server) as url:
        client = lp.PhoneClient(url)
        trainer = lp.DeviceTrainer(client.download(tmp_path / "model.tflite"))
        client.take_part(trainer, *data)
        assert client.round()["round"] == 1
        threading.Event().wait(2.5)
        assert server.rounds_done == 1  # without any request
        assert client.round()["round"] == 2
        assert server.history["clients"] == [1]
        threading.Event().wait(1.1)
        assert client.round()["round"] == 2  # without any update a round goes on


SERVE = """
import sys
import numpy as np, keras, uvicorn
import keras_lp as lp
model = keras.models.load_model(sys.argv[1])
server = lp.phone_server(
    model, sys.argv[2], clients_per_round=2, rounds=3, learning_rate=0.05, batch_size=32)
config = uvicorn.Config(server, host="127.0.0.1", port=int(sys.argv[3]), log_level="error")
print("ready", flush=True)
uvicorn.Server(config).run()
"""


def test_a_killed_server_continues_where_it_was(tmp_path, small, data):
    small.save(tmp_path / "start.keras")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    x, y = data
    parts = [(x[:20], y[:20]), (x[20:], y[20:])]

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, tmp_path / "start.keras", tmp_path / "state", str(port)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline().strip() == "ready"
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/model.json").close()
                return process
            except OSError:
                threading.Event().wait(0.05)
        raise AssertionError("the server did not start")

    def kill(process):
        process.kill()
        process.wait()
        process.stdout.close()

    process = start()
    clients = [lp.PhoneClient(url) for _ in range(2)]
    trainers = [
        lp.DeviceTrainer(client.download(tmp_path / f"{i}.tflite"))
        for i, client in enumerate(clients)
    ]
    try:
        for number in (1, 2, 3):
            assert clients[0].take_part(trainers[0], *parts[0])["round"] == number
            if number == 2:  # with one update of two
                kill(process)
                process = start()
                assert not clients[0].round()["takes_part"]
            assert clients[1].take_part(trainers[1], *parts[1])["round"] == number
        assert clients[0].round()["finished"]
    finally:
        kill(process)
    result = keras.models.load_model(tmp_path / "state" / "model.keras")
    # The same rounds without a kill.
    again = keras.models.load_model(tmp_path / "start.keras")
    server = lp.phone_server(again, tmp_path / "b", clients_per_round=2, rounds=3, **OPTIONS)
    with running(server) as url:
        clients = [lp.PhoneClient(url) for _ in range(2)]
        for _ in range(3):
            for client, trainer, part in zip(clients, trainers, parts, strict=True):
                client.take_part(trainer, *part)
    for ours, theirs in zip(result.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(head(result)[0]).max() > 1e-3


def test_a_folder_belongs_to_one_server_and_one_model(tmp_path, small, mlp):
    server = lp.phone_server(small, tmp_path, clients_per_round=1, rounds=1, **OPTIONS)
    with pytest.raises(ValueError, match="must belong to one server"):
        lp.phone_server(small, tmp_path, clients_per_round=1, rounds=1, **OPTIONS)
    server.close()
    other = lp.transfer_model(mlp((5,), 4), 3, pooling=None, optimizer="sgd", learning_rate=0.05)
    with pytest.raises(ValueError, match=r"these differ: \['model'\]"):
        lp.phone_server(other, tmp_path, clients_per_round=1, rounds=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"these differ: \['clients_per_round'\]"):
        lp.phone_server(small, tmp_path, clients_per_round=2, rounds=1, **OPTIONS)
    with running(lp.phone_server(small, tmp_path, clients_per_round=1, rounds=3, **OPTIONS)) as url:
        assert lp.PhoneClient(url).round()["rounds"] == 3


def test_tls_by_uvicorn(tmp_path, small, data):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    server = lp.phone_server(small, tmp_path / "s", clients_per_round=1, rounds=1, **OPTIONS)
    tls = {"ssl_certfile": tmp_path / "cert.pem", "ssl_keyfile": tmp_path / "key.pem"}
    with running(server, **tls) as url:
        with pytest.raises(ConnectionError, match="certificate"):
            lp.PhoneClient(url)
        with pytest.raises(ConnectionError):
            lp.PhoneClient(url.replace("https", "http"))
        client = lp.PhoneClient(url, context=ssl.create_default_context(cafile=tls["ssl_certfile"]))
        trainer = lp.DeviceTrainer(client.download(tmp_path / "model.tflite"))
        assert client.take_part(trainer, *data)["round"] == 1
        assert server.finished


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, small):
    folder = tmp_path / "server"
    private = lp.DifferentialPrivacy(epsilon=8, delta=1e-3)
    cases = [
        ({"clients_per_round": 0}, "`clients_per_round` must be an integer"),
        ({"clients_per_round": 5, "max_clients": 4}, "at most the number of clients"),
        ({"clients_per_round": 3, "tokens": ["a", "b"]}, "clients_per_round=3 for 2 clients"),
        ({"clients_per_round": 2, "round_seconds": -1}, "`round_seconds` must be a number above"),
        ({"clients_per_round": 2, "privacy": private}, "end by the clock"),
        (
            {"clients_per_round": 2, "privacy": private, "aggregation": "median"},
            "Noise is added to a mean",
        ),
        ({"clients_per_round": 2, "learning_rate": 0}, "`learning_rate`"),
        ({"clients_per_round": 2, "aggregation": "medain"}, "`aggregation` must be one of"),
        ({"clients_per_round": 2, "max_weight": 0}, "`max_weight` must be a number above 0"),
        ({"clients_per_round": 1, "tokens": ["a", "a"]}, "different ASCII strings"),
        ({"clients_per_round": 1, "tokens": "abc"}, "different ASCII strings"),
        (
            {
                "clients_per_round": 2,
                "max_clients": 10,
                "round_seconds": 9,
                "privacy": lp.DifferentialPrivacy(epsilon=8, delta=0.5),
            },
            "`delta` must be below 1 / clients",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            lp.phone_server(small, folder, rounds=2, **arguments)
    with pytest.raises(TypeError, match=r"Received: \['lerning_rate'\]"):
        lp.phone_server(small, folder, clients_per_round=1, rounds=1, lerning_rate=0.1)
    with pytest.raises(ValueError, match="shape"):
        lp.phone_server(
            small,
            folder,
            clients_per_round=1,
            rounds=1,
            validation_data=(np.zeros((2, 9)), np.zeros(2)),
        )
    with pytest.raises(TypeError, match="takes a Keras model"):
        lp.phone_server("model", folder, clients_per_round=1, rounds=1)
    assert not folder.exists()


def private_server(model, folder, **options):
    privacy = lp.DifferentialPrivacy(
        delta=1e-3, clip=0.05, seed=0, **{"noise_multiplier": 1.0, **options}
    )
    return lp.phone_server(
        model, folder, clients_per_round=4, rounds=3, max_clients=4, privacy=privacy,
        round_seconds=1000, **OPTIONS,
    )  # fmt: skip


def let_time_pass(server):
    """Ends the running round as its clock would."""
    with server._rounds._lock:
        with server._rounds._database as database:
            database.execute("UPDATE rounds SET started = 0")
        server._rounds.end_if_due()


def test_private_rounds_clip_add_noise_and_divide_by_the_expected_number(tmp_path, small):
    """Against the mechanism by hand, with its seed."""
    server = private_server(small, tmp_path)
    start = head(small)
    with running(server) as url:
        tokens = [lp.PhoneClient(url).token for _ in range(4)]
        good = changed(server)
        kernel = next(name for name in good if name.endswith("kernel"))
        huge = {**good, kernel: good[kernel] + np.float32(1e6)}
        for token, weights in zip(tokens, [good, good, good, huge], strict=True):
            assert send(url, token, packed(weights), examples=10**6)[0] == 200
        assert server.rounds_done == 0  # that all have answered ends nothing
        let_time_pass(server)
        assert server.rounds_done == 1
    rng = np.random.default_rng((0, 1, 2))  # the seed, the release, the purpose of noise
    noise = [0.05 * rng.standard_normal(w.shape) for w in start]
    small_change = [np.full(w.shape, 0.01) for w in start]
    assert np.sqrt(sum((c**2).sum() for c in small_change)) < 0.05  # not clipped
    huge_change = [np.full(start[0].shape, 1e6), np.full(start[1].shape, 0.01)]
    scale = 0.05 / np.sqrt(sum((c**2).sum() for c in huge_change))
    for i, weight in enumerate(head(small)):
        change = (3 * small_change[i] + scale * huge_change[i] + noise[i]) / 4
        np.testing.assert_allclose(weight - start[i], change, atol=1e-6)


def test_the_privacy_of_a_server_is_that_of_the_simulation(tmp_path, small, data):
    """The same account over the same rounds."""
    server = private_server(small, tmp_path)
    with running(server) as url:
        tokens = [lp.PhoneClient(url).token for _ in range(4)]
        for number in (1, 2, 3):
            for token in tokens:
                assert send(url, token, packed(changed(server)), number)[0] == 200
            let_time_pass(server)
    report = server.privacy_report()
    x, y = data
    clients = {i: (x[i::4], y[i::4]) for i in range(4)}
    federated = lp.FederatedAveraging(
        small, privacy=lp.DifferentialPrivacy(delta=1e-3, clip=0.05, seed=0, noise_multiplier=1.0)
    )
    history = federated.fit(clients, rounds=3, verbose=0).history
    assert server.history["epsilon"] == pytest.approx(history["epsilon"], rel=1e-9)
    assert (report.releases, report.population, report.sample) == (3, 4, 4)


def test_a_private_server_takes_drawn_clients_alone_and_never_draws_again(tmp_path, small):
    privacy = lp.DifferentialPrivacy(delta=1e-3, noise_multiplier=1.0, clip=0.05)
    options = {
        "clients_per_round": 10, "rounds": 2, "max_clients": 30, "privacy": privacy,
        "round_seconds": 0.5, "requests_per_minute": 1000, **OPTIONS,
    }  # fmt: skip
    server = lp.phone_server(small, tmp_path, **options)
    with running(server) as url:
        clients = [lp.PhoneClient(url) for _ in range(30)]
        if clients[0].round()["round"] == 1:
            taken = [client.round()["takes_part"] for client in clients]
    server = lp.phone_server(small, tmp_path, **{**options, "rounds": 2})
    with running(server) as url:
        clients = [lp.PhoneClient(url, token=client.token) for client in clients]
        drawn = json.loads(server._rounds._one("SELECT chosen FROM rounds WHERE number = 1"))
        assert drawn == [i for i, take in enumerate(taken) if take]
        assert 1 <= len(drawn) < 30
        threading.Event().wait(0.6)
        clients[0].round()  # the clock ended the first round: noise alone
        assert server.history["clients"][0] == 10  # expected: who came stays secret
        assert server.history["update_norm"][0] > 0
        now = clients[0].round()
        if not now["finished"]:
            out = next(c for c in clients if not c.round()["takes_part"])
            found, answer = send(url, out.token, packed(changed(server)), 2)
            assert (found, "not drawn" in answer["reason"]) == (403, True)


def test_a_private_server_stops_before_the_budget_and_counts_rounds_that_were_begun(
    tmp_path, small
):
    server = private_server(small, tmp_path, epsilon=6.0)
    releases = []
    for _ in range(10):
        if server.finished:
            break
        with running(server) as url:
            tokens = [lp.PhoneClient(url, token=t).token for t in releases] or [
                lp.PhoneClient(url).token for _ in range(4)
            ]
            releases = tokens
            for token in tokens:
                send(url, token, packed(changed(server)), server.rounds_done + 1)
            let_time_pass(server)
        server = private_server(small, tmp_path, epsilon=6.0)
    assert server.finished
    spent = server.history["epsilon"]
    assert spent[-1] <= 6.0
    account = server._rounds.privacy.account
    assert len(spent) == 3 or account.epsilon(len(spent) + 1) > 6.0
    server.close()


def test_a_round_that_cannot_be_ended_changes_nothing_and_is_ended_later(tmp_path, small):
    """The disk is full while the result of the round is written."""
    server = lp.phone_server(small, tmp_path, clients_per_round=1, rounds=1, **OPTIONS)
    start = head(small)
    with running(server) as url:
        client = lp.PhoneClient(url)
        good = changed(server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("keras_lp.web.rounds.write_weights", _full)
            request = urllib.request.Request(
                f"{url}/update?round=1&examples=1", data=packed(good),
                headers={"Authorization": f"Bearer {client.token}"},
            )  # fmt: skip
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            refused.value.close()
        for before, now in zip(start, head(small), strict=True):
            np.testing.assert_array_equal(before, now)
        assert client.round()["finished"]
    for before, now in zip(start, head(small), strict=True):
        np.testing.assert_allclose(now - before, 0.01, atol=1e-7)
    assert keras.models.load_model(tmp_path / "model.keras").get_weights()


def _full(*_):
    raise OSError(28, "No space left on device")


def test_history_of_a_server_that_evaluates_only_later(tmp_path, small, data):
    options = {"clients_per_round": 1, "rounds": 2, **OPTIONS}
    for number, validation in ((1, None), (2, data)):
        server = lp.phone_server(small, tmp_path, validation_data=validation, **options)
        with running(server) as url:
            token = lp.PhoneClient(url).token
            assert send(url, token, packed(changed(server)), number)[0] == 200
    assert np.isnan(server.history["val_loss"][0])
    assert server.history["val_loss"][1] > 0


def test_a_client_that_guesses_tokens_has_to_wait(tmp_path, small):
    options = {"requests_per_minute": 3, **OPTIONS}
    server = lp.phone_server(
        small, tmp_path, clients_per_round=1, rounds=1, tokens=["secret"], **options
    )
    with running(server) as url:
        found = [send(url, f"guess {i}", b"")[0] for i in range(5)]
    assert found == [401, 401, 401, 429, 429]


def test_an_update_whose_file_was_lost_is_asked_for_again(tmp_path, small):
    options = {"clients_per_round": 2, "rounds": 1, **OPTIONS}
    server = lp.phone_server(small, tmp_path, **options)
    with running(server) as url:
        token = lp.PhoneClient(url).token
        assert send(url, token, packed(changed(server)))[0] == 200
    (file,) = (tmp_path / "updates").iterdir()
    file.unlink()
    server = lp.phone_server(small, tmp_path, **options)
    with running(server) as url:
        assert lp.PhoneClient(url, token=token).round()["takes_part"]
        assert send(url, token, packed(changed(server)))[0] == 200
        assert send(url, lp.PhoneClient(url).token, packed(changed(server)))[0] == 200
    assert server.history["clients"] == [2]

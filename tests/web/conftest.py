"""A browser, web servers on 127.0.0.1, and small models for the pages."""

import contextlib
import functools
import http.server
import json
import threading
import time

import keras
import numpy as np
import pytest

import keras_lp as lp


@pytest.fixture(scope="session")
def browser(litert, browser):
    return browser


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """Serves a folder as any web server does; yields the address."""
    handler = functools.partial(_Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def running(application, **options):
    """Runs a phone server with uvicorn; yields the address."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            application, host="127.0.0.1", port=0, log_level="error", ws="none", **options
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"{'https' if options else 'http'}://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)
    application.close()


@contextlib.contextmanager
def opened(browser, address, **options):
    """Opens a page in a profile of its own and waits for the model."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    yield page
    context.close()


def infer(page, rows):
    """Runs examples in a page: from arrays `(examples, ...)` by input to those by output."""
    count = len(next(iter(rows.values())))
    given = [
        {name: np.asarray(array[i]).ravel().tolist() for name, array in rows.items()}
        for i in range(count)
    ]
    found = page.evaluate(
        """async rows => {
            const {open} = await import('./runner.js');
            const {signature} = await (await fetch('model.json')).json();
            const runner = await open('model.tflite');
            const all = [];
            for (const row of rows) {
                const outputs = Object.entries(await runner.run(signature, row));
                all.push(Object.fromEntries(outputs.map(([name, v]) => [name, Array.from(v)])));
            }
            return all;
        }""",
        given,
    )
    return {name: np.array([row[name] for row in found]) for name in found[0]}


def examples(x, y):
    """Examples as the scripts of a page take them, JSON values."""
    rows = np.asarray(x).reshape(len(x), -1).tolist()
    return [
        {"inputs": {"x": row}, "y": label}
        for row, label in zip(rows, np.asarray(y).tolist(), strict=True)
    ]


@pytest.fixture(scope="session")
def digits_network():
    """A network that knows the digits 0 to 4 of scikit-learn."""
    keras.utils.set_random_seed(0)
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, activation="relu", name="block1_conv"),
            keras.layers.Conv2D(8, 3, activation="relu", name="block2_conv"),
        ]
    )
    known = lp.transfer_model(network, 5, pretrained=False, trainable="all", pooling="flatten")
    known.fit(x[y < 5], y[y < 5], epochs=3, verbose=0)
    return known


def digits_model(network):
    """The network with a new head for all ten digits."""
    return lp.transfer_model(
        network,
        [f"digit {i}" for i in range(10)],
        pooling="flatten",
        cache_features=False,
        optimizer="sgd",
        learning_rate=0.05,
    )


def config(folder):
    return json.loads((folder / "model.json").read_text())

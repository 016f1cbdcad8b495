"""A page that reads drawn digits, and learns from yours: one link, no app.

    python examples/web_digits.py            # builds the page and serves it on 127.0.0.1:8000
    python examples/web_digits.py --together # pages also train one model together

A small network learns the 8 x 8 digits of scikit-learn, about half a minute on two cores. The page
runs it in the browser with LiteRT.js. Draw a digit, say what it is, and press "Train": the last
layer learns on your examples, which stay in the page. With `--together`, open the page in
two browsers (or a private window too: a browser is one device), add examples in both and press
"Take part": the server averages what they learned.
`--quick` trains for two epochs, writes the page to runs/web_digits and serves nothing.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import keras_lp as lp

OUT = Path("runs/web_digits")
TEXTS = {
    "title": "Handwritten digits",
    "description": "Draw a digit. The network that reads it runs in this page.",
}


def build(epochs: int) -> keras.Model:
    """A network for digits, trained on shifted and scaled copies too."""
    keras.utils.set_random_seed(0)
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    test = lp.load_dataset("digits", split="test", batch_size=-1)
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant"),
            keras.layers.RandomZoom(0.15, fill_mode="constant"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
        ]
    )
    names = [str(digit) for digit in range(10)]
    model = lp.transfer_model(network, names, pooling=None, pretrained=False, trainable="all")
    model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)
    accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    print(f"accuracy on the test digits {accuracy:.1%}")
    return model


def serve(port: int) -> None:
    """Serves the page as any web server does."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=OUT / "page")
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C ends)", flush=True)
        server.serve_forever()


def serve_rounds(model: keras.Model, port: int) -> None:
    """Serves the page with rounds of two pages each."""
    import uvicorn

    server = lp.phone_server(
        model,
        OUT / "server",
        clients_per_round=2,
        rounds=20,
        local_epochs=5,
        learning_rate=0.05,
        **TEXTS,
    )
    print(f"open http://127.0.0.1:{port} in two browsers (Ctrl-C ends)", flush=True)
    uvicorn.run(server, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--quick", action="store_true", help="two epochs, serve nothing")
    parser.add_argument("--together", action="store_true", help="serve rounds of several pages")
    arguments = parser.parse_args()
    model = build(2 if arguments.quick else 20)
    if arguments.together:
        serve_rounds(model, arguments.port)
    else:
        print(lp.export_web(model, OUT / "page", trainable="head", learning_rate=0.05, **TEXTS))
        if not arguments.quick:
            try:
                serve(arguments.port)
            except KeyboardInterrupt:
                print()

"""Pages in a real browser, compared with LiteRT, DeviceTrainer and NumPy."""

import base64
import io

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_lp as lp
from tests.conftest import with_random_heads
from tests.web.conftest import config, digits_model, examples, infer, opened, served

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, litert):
    """A folder that the tests write one page after another into."""
    return tmp_path_factory.mktemp("page")


def images(size, channels, count=4):
    return RNG.integers(0, 256, (count, size, size, channels)).astype("float32")


def conv(size=16, channels=3, width=8):
    return keras.Sequential(
        [
            keras.Input((size, size, channels)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(width, 3, strides=2, name="block1_conv"),
            keras.layers.BatchNormalization(name="block1_bn"),
            keras.layers.ReLU(name="block1_relu"),
            keras.layers.DepthwiseConv2D(3, activation="relu", name="block2_conv"),
        ]
    )


def built(network, tasks, **options):
    return with_random_heads(lp.transfer_model(network, tasks, **options))


def text_encoder(level="word"):
    texts = ["the cat sat on the mat", "a dog barks", "the dog sat", "naïve café, 42 times"] * 5
    return lp.TextEncoder.fit(texts, size=40, level=level, length=8)


def text_network(layer):
    encoder = text_encoder()
    ids = keras.Input((8,), dtype="int32", name="ids")
    return keras.Model(ids, layer(encoder.embedding(6)(ids)))


def two_inputs():
    a, b = keras.Input((5,), name="a"), keras.Input((3,), name="b")
    both = keras.layers.Dense(8, "gelu")(keras.layers.Concatenate()([a, b]))
    return keras.Model({"a": a, "b": b}, both)


def lora_model():
    model = lp.finetune_model(built(conv(), 3), lora=lp.LoRA(2))
    for weight in model.trainable_weights:
        weight.assign(RNG.normal(0, 0.3, weight.shape))
    return model


def softmax_model():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3, "softmax")]
    )


def transformer():
    ids = keras.Input((8,), dtype="int32", name="ids")
    x = keras.layers.Embedding(40, 16)(ids)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(2, 8)(x, x))
    return keras.Model(ids, keras.layers.GlobalAveragePooling1D()(x))


def mobile_net():
    network = keras.applications.MobileNetV2((96, 96, 3), 0.35, include_top=False, weights=None)
    for layer in network.layers:  # else all features are 0
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(np.full(layer.moving_variance.shape, 0.05))
    return network


IDS = RNG.integers(0, 12, (4, 8)).astype("int32")
THREE = {"kind": 3, "size": lp.Regression(), "has": lp.MultiLabel(2)}
MODELS = {
    "classes": lambda: (built(conv(), 3), {"input": images(16, 3)}),
    "labels": lambda: (built(conv(), lp.MultiLabel(["a", "b"])), {"input": images(16, 3)}),
    "values": lambda: (built(conv(), lp.Regression()), {"input": images(16, 3)}),
    "several tasks": lambda: (
        with_random_heads(
            lp.multitask_model(
                conv(), {"kind": 3, "size": lp.Regression(), "has": lp.MultiLabel(2)}
            )
        ),
        {"input": images(16, 3)},
    ),
    "several inputs": lambda: (
        built(two_inputs(), 3, pooling=None),
        {"a": RNG.normal(size=(4, 5)), "b": RNG.normal(size=(4, 3))},
    ),
    "text": lambda: (
        built(text_network(keras.layers.GlobalAveragePooling1D()), 3, pooling=None),
        {"ids": IDS},
    ),
    "GRU": lambda: (built(text_network(keras.layers.GRU(5)), 3, pooling=None), {"ids": IDS}),
    "attention": lambda: (built(transformer(), 3, pooling=None), {"ids": IDS}),
    "LoRA": lambda: (lora_model(), {"input": images(16, 3)}),
    "plain Keras": lambda: (softmax_model(), {"input": RNG.normal(size=(4, 6))}),
    "MobileNetV2": lambda: (built(mobile_net(), lp.Regression()), {"input": images(96, 3)}),
}


SLOW = {"MobileNetV2", "LoRA", "labels", "values"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in MODELS]
)
def test_a_page_computes_what_litert_does(kind, folder, browser):
    model, inputs = MODELS[kind]()
    lp.export_web(model, folder, verify=kind != "MobileNetV2")  # 1e-4 is for trained networks
    _compare(folder, browser, inputs)


@pytest.mark.parametrize(
    "quantization",
    ["int8", *(pytest.param(q, marks=pytest.mark.slow) for q in ("float16", "dynamic"))],
)
def test_quantized_files_too(quantization, folder, browser):
    data = {"calibration_data": images(16, 3, 50)} if quantization == "int8" else {}
    lp.export_web(built(conv(), 3), folder, quantization=quantization, tolerance=0.5, **data)
    _compare(folder, browser, {"input": images(16, 3)})


def _compare(folder, browser, inputs):
    interpreter = Interpreter(str(folder / "model.tflite"))
    run = interpreter.get_signature_runner()
    types = {name: one["dtype"] for name, one in run.get_input_details().items()}
    inputs = {name: array.astype(types[name]) for name, array in inputs.items()}
    rows = [run(**{n: a[i : i + 1] for n, a in inputs.items()}) for i in range(4)]
    with served(folder) as address, opened(browser, address) as page:
        found = infer(page, inputs)
    assert found.keys() == rows[0].keys()
    for name, values in found.items():
        expected = np.concatenate([row[name] for row in rows])
        assert expected.std(0).max() > 1e-3, "equal outputs would prove nothing"
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(values, expected, atol=1e-5 * scale)


@pytest.mark.parametrize("trainable", ["head", "all"])
def test_20_steps_of_training_equal_device_trainer(trainable, folder, browser, digits_network):
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x, y = x[:74].astype("float32"), y[:74]  # the last batch has 10 examples
    model = digits_model(digits_network)
    options = {"learning_rate": 0.1, "optimizer": "momentum", "batch_size": 16}
    lp.export_web(model, folder, trainable=trainable, **options)
    trainer = lp.DeviceTrainer(folder / "model.tflite")
    losses = trainer.fit(x, y, epochs=4, shuffle=False)
    figures = trainer.evaluate(x, y)
    with served(folder) as address, opened(browser, address) as page:
        found = page.evaluate(
            """async examples => {
                const {open} = await import('./runner.js');
                const runner = await open('model.tflite');
                const losses = await runner.fit(examples, {epochs: 4, shuffle: false});
                const weights = Object.entries(await runner.weights());
                return {
                    losses, figures: await runner.evaluate(examples), has: runner.has('features'),
                    weights: Object.fromEntries(weights.map(([k, v]) => [k, Array.from(v)])),
                };
            }""",
            examples(x, y),
        )
    assert losses[-1] < 0.6 * losses[0]
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    assert found["figures"] == pytest.approx(figures, rel=1e-5)
    assert found["has"] == (trainable == "head")
    for name, value in trainer.get_weights().items():
        np.testing.assert_allclose(found["weights"][name], value.ravel(), atol=1e-5)


@pytest.mark.parametrize(
    ("task", "y"),
    [
        (lp.MultiLabel(["odd", "low"]), [[1, 0], [-1, 1], [0, -1]]),
        (lp.Regression(), [[0.5], [2.0], [-1.0]]),
        (3, [0, -1, 2]),
    ],
    ids=["labels", "values", "missing class"],
)
def test_other_tasks_and_missing_labels_train_as_with_device_trainer(task, y, folder, browser):
    x = RNG.normal(size=(3, 4)).astype("float32")
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "tanh")])
    model = built(network, task, pooling=None)
    lp.export_web(model, folder, trainable="head", learning_rate=0.1)
    trainer = lp.DeviceTrainer(folder / "model.tflite")
    losses = trainer.fit(x, np.array(y), epochs=3, shuffle=False)
    with served(folder) as address, opened(browser, address) as page:
        found = page.evaluate(
            """async examples => {
                const {open} = await import('./runner.js');
                const runner = await open('model.tflite');
                const losses = await runner.fit(examples, {epochs: 3, shuffle: false});
                return {losses, figures: await runner.evaluate(examples)};
            }""",
            examples(x, y),
        )
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    assert found["figures"] == pytest.approx(trainer.evaluate(x, np.array(y)), rel=1e-5)


@pytest.mark.parametrize("level", ["word", "character", "byte_pair"])
def test_a_page_encodes_texts_as_the_encoder_does(level, folder, browser):
    encoder = text_encoder(level)
    ids = keras.Input((8,), dtype="int32", name="ids")
    pooled = keras.layers.GlobalAveragePooling1D()(encoder.embedding(4)(ids))
    lp.export_web(built(keras.Model(ids, pooled), 2, pooling=None), folder)
    texts = ["The CAT, sat?", "  a\tdog \n barks  ", "unknown words", "", "naïve CAFÉ", "x" * 20]
    with served(folder) as address, opened(browser, address) as page:
        found = page.evaluate(
            """async texts => {
                const {encoder} = await import('./text.js');
                const [input] = (await (await fetch('model.json')).json()).inputs;
                const encode = encoder(input.tokens, input.level, input.shape[0]);
                return texts.map(text => Array.from(encode(text)));
            }""",
            texts,
        )
        np.testing.assert_array_equal(found, encoder(texts))
        page.fill("textarea", "The cat sat")
        page.click("#run")
        assert "%" in page.inner_text("#outputs")


def test_weight_files_of_a_page_and_of_numpy(folder, browser):
    lp.export_web(softmax_model(), folder)
    arrays = {
        "kernel": RNG.normal(size=(3, 4)).astype("float32"),
        "bias": RNG.normal(size=(5,)).astype("float32"),
        "one": np.float32([[[2.5]]]),
        "version": RNG.integers(-(2**31), 2**31, 8).astype("int32"),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    with served(folder) as address, opened(browser, address) as page:
        returned = page.evaluate(
            """async ({content, shapes}) => {
                const {readNpz, writeNpz} = await import('./npz.js');
                const read = readNpz(Uint8Array.from(atob(content), c => c.charCodeAt(0)));
                return Array.from(await writeNpz(read, shapes));
            }""",
            {
                "content": base64.b64encode(file.getvalue()).decode(),
                "shapes": {name: list(array.shape) for name, array in arrays.items()},
            },
        )
    with np.load(io.BytesIO(bytes(returned))) as archive:  # checks the sums too
        assert set(archive) == set(arrays)
        for name, array in arrays.items():
            assert archive[name].dtype == array.dtype
            np.testing.assert_array_equal(archive[name], array)


SEVEN = [(0.25, 0.2), (0.75, 0.2), (0.45, 0.85)]
ONE = [(0.5, 0.15), (0.5, 0.85)]


def draw(page, points):
    box = page.locator("canvas.draw").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory, litert, digits_network):
    """The page of a model that reads digits and trains."""
    folder = tmp_path_factory.mktemp("digits_page")
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    model = digits_model(digits_network)
    lp.fit_head(model, (x, y), verbose=0)
    lp.export_web(
        model, folder, title="Digits & <more>", description="Draw one.", trainable="head", epochs=7
    )
    return folder


def test_drawing_teaching_keeping_and_forgetting_without_any_request(digits_page, browser):
    with served(digits_page) as address, opened(browser, address) as page:
        assert page.inner_text("h1") == "Digits & <more>"
        requests = []
        page.on("request", lambda request: requests.append(request))
        draw(page, SEVEN)
        page.click("#run")
        assert page.locator("#outputs tr.best").inner_text().startswith("✓ digit 7")
        # An answer that the model would not give by itself.
        page.select_option("#label select", label="digit 3")
        page.click("#add")
        page.click("#clear")
        draw(page, ONE)
        page.select_option("#label select", label="digit 1")
        page.click("#add")
        for _ in range(8):
            page.click("#train")
            page.get_by_text("Epoch 7 of 7").wait_for()
            page.wait_for_selector("#train:enabled")
        assert "100.0 % now" in page.inner_text("#progress")
        draw(page, SEVEN)
        page.click("#run")
        page.locator("#outputs tr.best", has_text="digit 3").wait_for()
        assert requests == [], "data left the page"

        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert "learned here before" in page.inner_text("#progress")
        assert page.locator("#examples li").count() == 0
        draw(page, SEVEN)
        page.click("#run")
        page.locator("#outputs tr.best", has_text="digit 3").wait_for()

        page.click("#forget")
        page.get_by_text("Forgotten").wait_for()
        page.click("#run")
        page.locator("#outputs tr.best", has_text="digit 7").wait_for()
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.inner_text("#progress") == ""


def test_a_page_says_what_is_missing(digits_page, browser):
    with served(digits_page) as address, opened(browser, address) as page:
        page.click("#run")
        assert page.inner_text("#status") == "Draw something first."
        page.click("#add")
        assert page.inner_text("#progress") == "Draw something first."
        assert page.locator("#train").is_disabled()
        (digits_page / "model.tflite").rename(digits_page / "away")
        page.reload()
        page.get_by_text("The model cannot be used here: model.tflite cannot be loaded").wait_for()
        (digits_page / "away").rename(digits_page / "model.tflite")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_on_a_phone(scheme, digits_page, browser):
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme, "has_touch": True}
    with served(digits_page) as address, opened(browser, address, **phone) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        draw(page, ONE)
        page.click("#run")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, back[4:-1].split(","))) > 200) == (scheme == "light")
        # Each control is a target of at least 44 pixels, and has a name.
        for control in page.locator("button, input, select").all():
            if control.is_visible():
                assert control.bounding_box()["height"] >= 44 - 0.5
        page.focus("#clear")
        page.keyboard.press("Enter")  # all works by keyboard
        assert page.locator("#result").is_hidden()
        assert errors == []


def test_pictures_are_scaled_as_the_metadata_say(folder, browser):
    """A file of one colour gives inputs that can be worked out by hand."""
    network = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    model = built(network, 3, pooling=None)
    lp.export_web(model, folder, metadata=lp.TFLiteMetadata(mean=127.5, std=2.0))
    picture = keras.utils.array_to_img(np.full((9, 7, 3), [255, 0, 51.0]), scale=False)
    file = io.BytesIO()
    picture.save(file, "PNG")
    with served(folder) as address, opened(browser, address) as page:
        page.set_input_files(
            "input[type=file]",
            {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()},
        )
        page.wait_for_selector("#outputs tr.best")
        shown = page.locator("#outputs tr.best td").last.inner_text()
    row = np.tile((np.array([255, 0, 51]) - 127.5) / 2, 16).reshape(1, 4, 4, 3).astype("float32")
    run = Interpreter(str(folder / "model.tflite")).get_signature_runner()
    best = run(input=row)["predictions"].max()
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * best, abs=0.06)


def test_a_table_of_numbers_has_their_names(folder, browser):
    names = ["age", "weight", "height", "pulse", "a", "b"]
    lp.export_web(softmax_model(), folder, feature_names=names)
    with served(folder) as address, opened(browser, address) as page:
        assert page.locator(".numbers label").all_inner_texts() == names
        page.get_by_label("age").fill("1,5")
        page.click("#run")
        assert page.inner_text("#status") == "Give 6 numbers: there are 1."
        page.get_by_label("pulse").fill("many")
        page.click("#run")
        assert page.inner_text("#status") == 'Give numbers: "many" is not one.'
        for name in names[1:]:
            page.get_by_label(name, exact=True).fill("-2")
        page.click("#run")
        page.wait_for_selector("#outputs tr.best")
        shown = page.locator("#outputs tr.best td").last.inner_text()
    run = Interpreter(str(folder / "model.tflite")).get_signature_runner()
    (best,) = run(input=np.float32([[1.5, -2, -2, -2, -2, -2]])).values()
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * best.max(), abs=0.06)


def test_the_policy_forbids_other_sites(digits_page, browser):
    with served(digits_page) as address, opened(browser, address) as page:
        blocked = page.evaluate("fetch('http://127.0.0.1:9/x').then(() => false, e => e.message)")
        assert "Failed" in blocked or "Content Security" in blocked
        assert (
            page.evaluate(
                """new Promise(resolve => {
                const said = event => resolve(event.violatedDirective);
                document.addEventListener('securitypolicyviolation', said);
                fetch('http://127.0.0.1:9/x').catch(() => {});
            })"""
            )
            == "connect-src"
        )


def test_what_a_page_knows_about_its_model(folder):
    model = lp.multitask_model(conv(), {"kind": ["cat", "dog"], "has": lp.MultiLabel(["hat"])})
    lp.export_web(with_random_heads(model), folder)
    known = config(folder)
    assert [one["kind"] for one in known["inputs"]] == ["picture"]
    assert [(one["name"], one["kind"], one["labels"]) for one in known["outputs"]] == [
        ("has", "labels", ["hat"]),
        ("kind", "classes", ["cat", "dog"]),
    ]
    assert known["training"] is None
    assert known["server"] is False


def test_export_web_refuses_what_a_page_cannot_do(tmp_path, litert):
    model = softmax_model()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        lp.export_web(model, tmp_path / "other")
    assert (tmp_path / "other" / "index.html").read_text() == "mine"
    with pytest.raises(ValueError, match="`feature_names` must have a name for each number"):
        lp.export_web(model, tmp_path / "page", feature_names=["a"])
    with pytest.raises(ValueError, match=r"Received: \['batch_size'\]"):
        lp.export_web(model, tmp_path / "page", batch_size=4)
    with pytest.raises(TypeError, match="takes a Keras model"):
        lp.export_web("model.keras", tmp_path / "page")
    with pytest.raises(TypeError, match="quantisation"):
        lp.export_web(model, tmp_path / "page", quantisation="int8")
    rows = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(2, "softmax")])
    rows.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"output of shape \(None, 4, 2\)"):
        lp.export_web(rows, tmp_path / "page", trainable="all")
    wide = keras.Sequential([keras.Input((3,), dtype="int64"), keras.layers.Embedding(4, 2)])
    with pytest.raises(ValueError, match="dtype int64"):
        lp.export_web(wide, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_folder_of_an_export_that_was_killed_can_be_used_again(tmp_path, litert):
    (tmp_path / "model.tflite").write_bytes(b"only this was written")
    lp.export_web(softmax_model(), tmp_path)
    assert (tmp_path / "index.html").exists()

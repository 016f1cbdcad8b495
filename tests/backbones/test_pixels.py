"""Pictures from 0 to 1 for a network that takes 0 to 255."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp

RAW = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype("float32")
LABELS = np.arange(12) % 2


def named(name="MobileNet", **options):
    return lp.transfer_model(
        name, 2, weights=None, pretrained=True, input_shape=(32, 32, 3), **options
    )


def own():
    layers = [keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    return lp.transfer_model(keras.Sequential([*layers, keras.layers.Dense(4)]), 2)


def as_dataset(x):
    return tf.data.Dataset.from_tensor_slices((x, LABELS)).batch(4)


CALLS = {
    "fit": lambda model, x: model.fit(x, LABELS, verbose=0),
    "fit, data set": lambda model, x: model.fit(as_dataset(x), verbose=0),
    "predict": lambda model, x: model.predict(x, verbose=0),
    "predict, data set": lambda model, x: model.predict(as_dataset(x), verbose=0),
    "fit_head": lambda model, x: lp.fit_head(model, (x, LABELS), verbose=0),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("scale", [lambda x: x / 255, lambda x: x / 127.5 - 1], ids=["0", "-1"])
def test_scaled_pictures_are_told_once(call, scale):
    model = own()
    with pytest.warns(UserWarning, match=r"raw pixels from 0 to 255.*multiply by 255"):
        CALLS[call](model, scale(RAW))
    CALLS[call](model, scale(RAW))  # a second warning would be an error here


@pytest.mark.parametrize("name", ["MobileNet", "ResNet50", "EfficientNetB0"])
def test_every_kind_of_preprocessing_is_known(name):
    model = named(name)
    with pytest.warns(UserWarning, match="raw pixels"):
        model.predict(RAW[:1] / 255, verbose=0)


def test_what_is_not_told():
    for x in (RAW, RAW.astype("uint8"), np.zeros_like(RAW), np.round(RAW / 255), RAW / 100):
        for call in ("fit", "predict"):
            CALLS[call](own(), x)
    plain = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()])
    lp.transfer_model(plain, 2).fit(RAW / 255, LABELS, verbose=0)


def test_verification_data_are_looked_at(tmp_path):
    pytest.importorskip("ai_edge_litert.interpreter")
    with pytest.warns(UserWarning, match="images of `verification_data`"):
        lp.export_tflite(own(), tmp_path / "m.tflite", verification_data=RAW / 255)


def test_clients_are_looked_at():
    from keras_lp.federated.clients.clients import fitting_arrays

    model = own()
    with pytest.warns(UserWarning, match="images of `x of client 'a'`"):
        fitting_arrays(model, "a", (RAW / 255, LABELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitting_arrays(model, "b", (RAW / 255, LABELS))

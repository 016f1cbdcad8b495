"""Fine-tuning KerasHub tasks: strings in, their own preprocessing and loss."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.backbones.blocks import head_layers
from keras_lp.model.adapters import adapted_layers
from tests.backbones.hub import LABELS, LANGUAGE, SENTENCES, bert_classifier, gpt2_language_model

keras_hub = pytest.importorskip("keras_hub")

MAKE = {"classifier": bert_classifier, "language model": gpt2_language_model}
LORA = lp.LoRA(rank=2, layers=["query", "value"])


@pytest.fixture(params=list(MAKE))
def kind(request):
    return request.param


def eager(kind):
    """A task that needs no tracing, and takes what its preprocessor makes."""
    model = MAKE[kind]()
    model.compile(run_eagerly=True)
    model.preprocessor = None
    return model


@functools.cache
def prepared(kind):
    """The sentences as the task's own preprocessor makes them: inputs, labels, weights."""
    found = MAKE[kind]().preprocessor(SENTENCES)
    if kind == "classifier":
        return found, LABELS, np.ones(4, "float32")
    return found[0], np.asarray(found[1]), np.asarray(found[2], "float32")


def fit(model, kind, epochs=1):
    x, y, weights = prepared(kind)
    model.fit(x, y, sample_weight=weights, batch_size=4, epochs=epochs, verbose=0)


def logits(model, kind):
    return np.asarray(model(prepared(kind)[0]))


def moved(model, kind, epochs=1):
    """Which variables `fit` moves, by path, and how far."""
    before = [(v, np.array(v)) for v in model.weights]
    fit(model, kind, epochs)
    steps = {v.path: np.asarray(v) - old for v, old in before}
    return {path: step for path, step in steps.items() if np.any(step)}


def test_strings_train_with_the_loss_of_the_task(kind):
    """The loss is the cross entropy of the preprocessed batch."""
    model = MAKE[kind]()
    model.compile(run_eagerly=True)
    loss, preprocessor = model.loss, model.preprocessor
    assert lp.finetune_model(model) is model
    assert (model.loss, model.preprocessor) == (loss, preprocessor)
    _, y, weights = prepared(kind)
    outputs = logits(model, kind).astype("float64")
    probabilities = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    right = np.take_along_axis(probabilities, y[..., None], -1)[..., 0]
    labels = [LABELS] if kind == "classifier" else []
    history = model.fit(SENTENCES, *labels, batch_size=4, verbose=0).history
    assert set(history) == {"loss", "sparse_categorical_accuracy"}
    # Keras divides by all places, padded ones too.
    assert history["loss"] == pytest.approx([(-np.log(right) * weights).mean()], rel=1e-5)
    assert kind == "classifier" or 0 < weights.mean() < 1


def test_one_step_is_plain_sgd_at_the_rate_of_each_block(kind):
    model = lp.finetune_model(
        eager(kind), optimizer="sgd", learning_rate=0.5, layer_decay=0.5, weight_decay=None
    )
    x, y, weights = prepared(kind)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape() as tape:
        value = loss(y, model(x, training=True), sample_weight=weights)
    variables = model.trainable_variables
    gradients = tape.gradient(value, [v.value for v in variables])
    steps = moved(model, kind)
    for variable, gradient, rate in zip(
        variables, gradients, model.optimizer.multipliers, strict=True
    ):
        expected = -0.5 * rate * np.asarray(tf.convert_to_tensor(gradient))
        np.testing.assert_allclose(
            steps.get(variable.path, 0.0), expected, atol=1e-6, err_msg=variable.path
        )


def multipliers(model):
    """The multiplier of each block, by the start of its paths."""
    found = {}
    rates = model.optimizer.multipliers
    for variable, rate in zip(model.trainable_variables, rates, strict=True):
        assert found.setdefault(variable.path.split("/")[0], rate) == rate
    return found


def test_each_block_of_a_classifier_has_its_rate():
    assert multipliers(lp.finetune_model(bert_classifier(), layer_decay=0.5)) == {
        "token_embedding": 0.5**4,
        "position_embedding": 0.5**4,
        "segment_embedding": 0.5**4,
        "embeddings_layer_norm": 0.5**4,
        "transformer_layer_0": 0.5**3,
        "transformer_layer_1": 0.5**2,
        "pooled_dense": 0.5,
        "logits": 1.0,
    }


def test_the_top_block_of_a_language_model_learns_at_the_full_rate():
    """Its embeddings give the logits too; they are its lowest block, and there is no head."""
    model = lp.finetune_model(gpt2_language_model(), layer_decay=0.5)
    assert head_layers(model) == []
    assert multipliers(model) == {
        "token_embedding": 0.25,
        "position_embedding": 0.25,
        "transformer_layer_0": 0.5,
        "transformer_layer_1": 1.0,
        "layer_norm": 1.0,
    }
    lp.finetune_model(model, learning_rate=(1e-5, 1e-3))
    rates = {1e-3 * rate for rate in multipliers(model).values()}
    assert sorted(rates) == pytest.approx([1e-5, 1e-4, 1e-3])


def test_adapters_and_head_move_and_nothing_else(kind):
    model = lp.finetune_model(eager(kind), lora=LORA, learning_rate=0.01)
    steps = moved(model, kind, epochs=2)
    names = {path.split("/")[-2] + " " + path.split("/")[-1] for path in steps}
    adapters = {f"{layer} lora_kernel_{ab}" for layer in ("query", "value") for ab in "ab"}
    head = {"logits kernel", "logits bias"} if kind == "classifier" else set()
    assert names == adapters | head
    assert len(steps) == len(model.trainable_variables) == 2 * 4 + len(head)


def test_the_head_of_a_task_is_all_that_is_above_its_backbone():
    """RoBERTa's has a dense layer more, which no preset has trained."""
    model = keras_hub.models.RobertaTextClassifier(
        keras_hub.models.RobertaBackbone(**LANGUAGE), num_classes=2
    )
    lp.finetune_model(model, lora=LORA)
    head = {v.path for v in model.trainable_variables if "lora" not in v.path}
    assert head == {f"{layer}/{v}" for layer in ("pooled_dense", "logits") for v in
                    ("kernel", "bias")}  # fmt: skip


def test_saved_adapters_load_into_the_same_task(kind, tmp_path):
    model = eager(kind)
    pretrained = model.get_weights()
    fit(lp.finetune_model(model, lora=LORA, learning_rate=0.05), kind, epochs=2)
    lp.save_adapters(model, tmp_path / "a.npz")
    fresh = eager(kind)
    fresh.set_weights(pretrained)
    lp.finetune_model(fresh, lora=LORA)
    assert np.abs(logits(fresh, kind) - logits(model, kind)).max() > 1e-3
    lp.load_adapters(fresh, tmp_path / "a.npz")
    np.testing.assert_array_equal(logits(fresh, kind), logits(model, kind))


def test_merged_adapters_keep_the_outputs_and_the_task_trains_on(kind):
    """Also those of embeddings that give the logits too."""
    lora = lp.LoRA(rank=2, layers=["query", "value", "token_embedding"])
    model = lp.finetune_model(eager(kind), lora=lora, learning_rate=0.05)
    fit(model, kind, epochs=2)
    before = logits(model, kind)
    lp.merge_adapters(model)
    np.testing.assert_allclose(logits(model, kind), before, atol=1e-6)
    assert not adapted_layers(model)
    assert {v.path.split("/")[0] for v in model.trainable_variables} <= {"logits"}
    fit(lp.finetune_model(model, trainable=1, learning_rate=0.01), kind)
    assert np.abs(logits(model, kind) - before).max() > 1e-3


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_a_saved_task_loads_and_trains_on(kind, tmp_path):
    """KerasHub compiles it again when it loads; the adapters are folded in."""
    model = MAKE[kind]()
    lp.finetune_model(model, lora=LORA)
    for layer in adapted_layers(model):
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.3))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_allclose(logits(loaded, kind), logits(model, kind), atol=1e-6)
    for a, b in zip(*(keras.tree.flatten(m.preprocessor(SENTENCES)) for m in (loaded, model)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    loaded.compile(run_eagerly=True)
    loaded.preprocessor = None
    lp.finetune_model(loaded, lora=LORA, learning_rate=0.05)
    steps = moved(loaded, kind, epochs=2)
    assert len(steps) == len(loaded.trainable_variables) == len(model.trainable_variables)
    assert any("lora" in path for path in steps)


def test_a_language_model_still_generates_with_its_sampler():
    """Greedy: at each place the most probable token of the adapted model."""
    model = gpt2_language_model()
    model.compile(sampler="greedy", run_eagerly=True)
    sampler = model.sampler
    lp.finetune_model(model, lora=LORA)
    untrained = model.generate("the", max_length=8)
    for i, layer in enumerate(adapted_layers(model)):
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.3 + i))
    assert model.sampler is sampler

    def by_hand(text):
        prompt = model.preprocessor.generate_preprocess([text], sequence_length=8)
        tokens, mask = (np.array(prompt[name]) for name in ("token_ids", "padding_mask"))
        for i in range(int(mask.sum()), 8):
            mask[0, i] = 1
            tokens[0, i] = np.argmax(model({"token_ids": tokens, "padding_mask": mask})[0, i - 1])
        return model.preprocessor.generate_postprocess({"token_ids": tokens, "padding_mask": mask})

    found = model.generate("the", max_length=8)
    assert found == by_hand("the")[0]
    assert found != untrained
    lp.merge_adapters(model)
    assert model.sampler is sampler
    assert model.generate("the", max_length=8) == found


def test_a_head_that_is_not_there_cannot_train():
    model = gpt2_language_model()
    with pytest.raises(ValueError, match=r"trainable='head'.*has no head.*trainable=1"):
        lp.finetune_model(model, trainable="head")
    assert len(model.trainable_variables) == len(model.weights)

"""The undocumented names of TFF and TensorFlow that rounds are built on still exist."""

import importlib
import importlib.metadata
import inspect

import numpy as np
import pytest
import tensorflow as tf

from keras_lp.federated.engine import installation
from keras_lp.federated.tff_runtime import load_tff

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
CORE = "tensorflow_federated.python.core"
NAMES = {
    f"{CORE}.backends.native.compiler": "desugar_and_transform_to_native",
    f"{CORE}.environments.tensorflow_frontend.tensorflow_computation": "transform_args",
    f"{CORE}.impl.execution_contexts.sync_execution_context": "SyncExecutionContext",
}


@pytest.mark.parametrize("module", NAMES)
def test_tff_still_has_what_the_context_is_made_of(module):
    """Used in `keras_lp.federated.tff_runtime`, seen in TFF 0.87."""
    load_tff()
    version = importlib.metadata.version("tensorflow-federated")
    gone = f"TFF {version} has no {module}.{NAMES[module]} any more: see federated/tff_runtime.py."
    try:
        found = getattr(importlib.import_module(module), NAMES[module], None)
    except ImportError as error:
        pytest.fail(f"{gone} {error}")
    assert found is not None, gone


def test_the_context_takes_the_arguments_that_it_is_given():
    load_tff()
    module = importlib.import_module(f"{CORE}.impl.execution_contexts.sync_execution_context")
    taken = set(inspect.signature(module.SyncExecutionContext).parameters)
    assert {"executor_fn", "compiler_fn", "transform_args", "transform_result"} <= taken


def test_a_concrete_function_takes_other_values_for_what_it_captures():
    """Used in `_without_captures` of the clients' work, seen in TensorFlow 2.21."""
    captured = tf.constant([1.0, 2.0])
    concrete = tf.function(lambda x: x + captured).get_concrete_function(tf.TensorSpec((2,)))
    call = getattr(concrete, "_call_flat", None)
    assert call is not None, (
        f"TensorFlow {tf.__version__} has no ConcreteFunction._call_flat any more: see "
        "federated/engine/client_work.py."
    )
    result = call([tf.constant([10.0, 10.0])], [tf.constant([5.0, 6.0])])
    np.testing.assert_array_equal(result, [15.0, 16.0])

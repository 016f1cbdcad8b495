"""Search over the settings of the builders with keras-tuner."""

try:
    import keras_tuner  # noqa: F401
except ImportError as error:
    raise ImportError(
        "The search needs keras-tuner. Install it: pip install 'keras_lp[tune]'"
    ) from error

from keras_lp.tuning.federated import FederatedHyperModel
from keras_lp.tuning.finetune import FinetuneHyperModel
from keras_lp.tuning.multitask import MultitaskHyperModel
from keras_lp.tuning.result import TuningResult
from keras_lp.tuning.transfer import TransferHyperModel
from keras_lp.tuning.tune import tune

__all__ = [
    "FederatedHyperModel",
    "FinetuneHyperModel",
    "MultitaskHyperModel",
    "TransferHyperModel",
    "TuningResult",
    "tune",
]

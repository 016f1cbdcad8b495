"""keras_lp: learning paradigms that reuse knowledge, as one-line builders on Keras 3.

Import it as `import keras_lp as lp`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from keras_lp import balancing
from keras_lp.backbones.text import TextEncoder
from keras_lp.balancing.ways import Balancing
from keras_lp.finetuning.finetune import finetune_model, merge_adapters
from keras_lp.finetuning.lora import LoRA, load_adapters, save_adapters
from keras_lp.finetuning.rate_finder import LearningRates, find_learning_rate
from keras_lp.finetuning.rates import layerwise
from keras_lp.finetuning.two_phase import fit_two_phase
from keras_lp.finetuning.unfreezing import GradualUnfreezing
from keras_lp.model.calibration import Calibration, calibrate
from keras_lp.model.model import Model
from keras_lp.model.plain import class_names, plain_model
from keras_lp.model.report import trainable_report
from keras_lp.model.report_page import Report, report
from keras_lp.model.thresholds import choose_thresholds
from keras_lp.multitask.comparison import Comparison, compare_single_tasks
from keras_lp.multitask.mixing import mix
from keras_lp.multitask.multitask import multitask_model
from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import decode_predictions
from keras_lp.tasks.multi_label import MultiLabel
from keras_lp.tasks.regression import Regression
from keras_lp.transfer.linear_probe import fit_head
from keras_lp.transfer.transfer import transfer_model

if TYPE_CHECKING:  # for editors; imported on first use, see below
    from keras_lp.audit import audit_membership, audit_update_leakage
    from keras_lp.data import load_dataset, load_folder
    from keras_lp.federated import (
        FederatedAveraging,
        FlowerApp,
        PersonalModels,
        Quantize,
        TopK,
        describe_clients,
        federated_workers,
        flower_app,
        partition,
        personalize,
        split_clients,
    )
    from keras_lp.tflite import (
        DeviceTrainer,
        PhoneClient,
        TFLiteMetadata,
        aggregate_device_updates,
        export_tflite,
        export_trainable_tflite,
    )
    from keras_lp.tuning import (
        FederatedHyperModel,
        FinetuneHyperModel,
        MultitaskHyperModel,
        TransferHyperModel,
        TuningResult,
        tune,
    )
    from keras_lp.web import PhoneServer, export_web, phone_server

__version__ = "0.1.0"

# Imported on first use: they need heavy or optional packages.
_LAZY = {
    "audit_membership": "keras_lp.audit",
    "audit_update_leakage": "keras_lp.audit",
    "FederatedAveraging": "keras_lp.federated",
    "FlowerApp": "keras_lp.federated",
    "PersonalModels": "keras_lp.federated",
    "Quantize": "keras_lp.federated",
    "TopK": "keras_lp.federated",
    "describe_clients": "keras_lp.federated",
    "federated_workers": "keras_lp.federated",
    "flower_app": "keras_lp.federated",
    "partition": "keras_lp.federated",
    "personalize": "keras_lp.federated",
    "split_clients": "keras_lp.federated",
    "DeviceTrainer": "keras_lp.tflite",
    "PhoneClient": "keras_lp.tflite",
    "TFLiteMetadata": "keras_lp.tflite",
    "aggregate_device_updates": "keras_lp.tflite",
    "export_tflite": "keras_lp.tflite",
    "export_trainable_tflite": "keras_lp.tflite",
    "load_dataset": "keras_lp.data",
    "load_folder": "keras_lp.data",
    "FederatedHyperModel": "keras_lp.tuning",
    "FinetuneHyperModel": "keras_lp.tuning",
    "MultitaskHyperModel": "keras_lp.tuning",
    "TransferHyperModel": "keras_lp.tuning",
    "TuningResult": "keras_lp.tuning",
    "tune": "keras_lp.tuning",
    "PhoneServer": "keras_lp.web",
    "export_web": "keras_lp.web",
    "phone_server": "keras_lp.web",
}

__all__ = [
    "Balancing",
    "Calibration",
    "Classification",
    "Comparison",
    "DeviceTrainer",
    "DifferentialPrivacy",
    "FederatedAveraging",
    "FederatedHyperModel",
    "FinetuneHyperModel",
    "FlowerApp",
    "GradualUnfreezing",
    "LearningRates",
    "LoRA",
    "Model",
    "MultiLabel",
    "MultitaskHyperModel",
    "PersonalModels",
    "PhoneClient",
    "PhoneServer",
    "Quantize",
    "Regression",
    "Report",
    "TFLiteMetadata",
    "TextEncoder",
    "TopK",
    "TransferHyperModel",
    "TuningResult",
    "aggregate_device_updates",
    "audit_membership",
    "audit_update_leakage",
    "balancing",
    "calibrate",
    "choose_thresholds",
    "class_names",
    "compare_single_tasks",
    "decode_predictions",
    "describe_clients",
    "export_tflite",
    "export_trainable_tflite",
    "export_web",
    "federated_workers",
    "find_learning_rate",
    "finetune_model",
    "fit_head",
    "fit_two_phase",
    "flower_app",
    "layerwise",
    "load_adapters",
    "load_dataset",
    "load_folder",
    "merge_adapters",
    "mix",
    "multitask_model",
    "partition",
    "personalize",
    "phone_server",
    "plain_model",
    "report",
    "save_adapters",
    "split_clients",
    "trainable_report",
    "transfer_model",
    "tune",
]


if not TYPE_CHECKING:  # a checker knows the names from above, and reports others

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'keras_lp' has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

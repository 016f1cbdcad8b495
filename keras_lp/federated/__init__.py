"""Federated learning with TensorFlow Federated."""

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients.describe import describe_clients
from keras_lp.federated.clients.partition import partition
from keras_lp.federated.engine.compression import Quantize, TopK
from keras_lp.federated.personalize import PersonalModels, personalize, split_clients
from keras_lp.federated.workers import federated_workers

__all__ = [
    "FederatedAveraging",
    "PersonalModels",
    "Quantize",
    "TopK",
    "describe_clients",
    "federated_workers",
    "partition",
    "personalize",
    "split_clients",
]

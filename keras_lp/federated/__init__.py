"""Federated learning with TensorFlow Federated."""

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients.describe import describe_clients
from keras_lp.federated.clients.partition import partition
from keras_lp.federated.engine.compression import Quantize, TopK
from keras_lp.federated.fleet.app import FlowerApp, flower_app
from keras_lp.federated.personalize import PersonalModels, personalize, split_clients
from keras_lp.federated.workers import federated_workers

__all__ = [
    "FederatedAveraging",
    "FlowerApp",
    "PersonalModels",
    "Quantize",
    "TopK",
    "describe_clients",
    "federated_workers",
    "flower_app",
    "partition",
    "personalize",
    "split_clients",
]

"""Federated learning with TensorFlow Federated."""

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients.describe import describe_clients
from keras_lp.federated.clients.partition import partition
from keras_lp.federated.engine.compression import Quantize, TopK

__all__ = ["FederatedAveraging", "Quantize", "TopK", "describe_clients", "partition"]

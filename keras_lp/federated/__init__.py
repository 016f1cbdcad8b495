"""Federated learning with TensorFlow Federated."""

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients.describe import describe_clients
from keras_lp.federated.clients.partition import partition

__all__ = ["FederatedAveraging", "describe_clients", "partition"]

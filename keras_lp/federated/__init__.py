"""Federated learning with TensorFlow Federated."""

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients import partition

__all__ = ["FederatedAveraging", "partition"]

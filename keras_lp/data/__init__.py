"""Data sets by name and from folders, in the form that the builders take."""

from keras_lp.data.folder import load_folder
from keras_lp.data.tfds import load_dataset

__all__ = ["load_dataset", "load_folder"]

"""Are rounds on several workers faster than on one?

    python benchmarks/federated_workers.py

A federation of 100 clients with 60 pictures of 28 x 28 random pixels each trains a small
convolutional network. The same rounds run on the worker of this process, and with
`lp.federated_workers` on 1, 2 and 4 workers, in turn. All workers are on this machine and share its
cores, so this measures the cost of the way, not a gain: a gain needs more machines. The first round
of each, which compiles, is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_lp as lp
from benchmarks.lib.arguments import add_out
from benchmarks.lib.pages import write_page

CLIENTS = 100
EXAMPLES = 60
COUNTS = (1, 2, 4)

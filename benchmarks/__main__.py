r"""Which way to learn is best, on the same data, from the same network, in as many steps?

    python -m benchmarks --quick                       # digits, about 4 minutes
    TFDS_DATA_DIR=... python -m benchmarks --mobilenet mobilenet_2_5_224_tf_no_top.h5 \
        --cifar10 cifar10_subset.npz                   # all data sets, some hours
    python -m benchmarks --only LoRA --data trec       # a part; what was run is kept

A network is trained on other data: half of the classes of the same data set (digits, mnist,
fashion_mnist), digits of mnist (Bangla digits), ImageNet (cifar10_subset and pneumonia_mnist,
MobileNet 0.25 at 64 by 64 pixels), or the other of the two text data sets (trec and the domains of
clinc_oos). Each way then learns from a few labelled examples, in 400 steps of 20 (120 with
`--quick`), with the settings of `examples/quickstart.py`, which were chosen on training examples of
digits. A federation has ten clients and passes over the same number of examples. "One task" and
"multitask" train all weights; multitask has a second label (odd or even; a vehicle or not; the fine
type or intent) of at least 400 examples. A seed changes the examples, the networks that are trained
here and the clients. Accuracy is that on at most 1,000 test examples, mean and standard deviation
over the seeds; AUC is one class against the others; balanced accuracy, AUC and what is forgotten
are means too, other figures are medians. Forgotten: how much accuracy on the source classes the
network loses under the head that it had for them. Bytes: of all updates and weights, to and from
all clients. CPU seconds are those of all cores, and of TFF's worker. The operations of a training
are an estimate from those of a prediction, without what solves a head. Peak memory is that of the
process above what it had before, without TFF's worker. The file is a float32 `.tflite`; its latency
is that of one example on one thread of this machine.

It writes `report.html`, `report.md` and `report.json`. Runs are kept in `report.full.json`, or
`report.quick.json`, and are not run again unless their code changed: a comparison that was stopped
or killed goes on. The peers Flower and AutoKeras run where they are installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(given: list[str] | None = None) -> None:
    """Runs the comparison with options, by default those of the command line."""
    folder = Path(__file__).resolve().parent
    sys.path[:0] = [str(folder), str(folder.parent / "examples")]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if given is None:
        from quiet import hide_machine_notes

        hide_machine_notes()
    from lib.compare import compare

    compare(__doc__ or "", given)


if __name__ == "__main__":
    main()

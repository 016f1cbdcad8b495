"""A phone of `phones_federated.py`: LiteRT and NumPy alone; its data stay in its folder.

    python phone.py EPOCHS

Each line on its standard input names the weights to load and where to write what it learned from
them.
"""

import sys

for name in ("tensorflow", "keras", "keras_lp"):
    sys.modules[name] = None  # a phone has none of these: importing one fails

import numpy as np  # noqa: E402
from device import DeviceTrainer  # noqa: E402 (copied beside this file)

data = np.load("data.npz")
trainer = DeviceTrainer("model.tflite")
for line in sys.stdin:
    received, update = line.split()
    trainer.load_weights(received)
    losses = trainer.fit(data["x"], data["y"], epochs=int(sys.argv[1]))
    trainer.save_weights(update)
    print(f"{losses[-1]:.4f}", flush=True)

"""A phone of `phones_federated.py`: LiteRT and NumPy alone; its data stay in its folder.

    python examples/phone.py --quick

Run like this, it starts `phones_federated.py`, which makes a folder for each phone and runs a copy
of this file there, with the number of epochs. Each line on standard input names the weights to load
and the file to write what the phone learned from them.
"""

import subprocess
import sys
from pathlib import Path

if not Path(__file__).with_name("device.py").exists():  # not in the folder of a phone
    server = Path(__file__).with_name("phones_federated.py")
    sys.exit(subprocess.run([sys.executable, server, *sys.argv[1:]], check=False).returncode)

for name in ("tensorflow", "keras", "keras_lp"):
    sys.modules[name] = None  # a phone has none of these: importing one fails

import numpy as np  # noqa: E402
from device import DeviceTrainer  # noqa: E402

data = np.load("data.npz")
trainer = DeviceTrainer("model.tflite")
for line in sys.stdin:
    received, update = line.split()
    trainer.load_weights(received)
    losses = trainer.fit(data["x"], data["y"], epochs=int(sys.argv[1]))
    trainer.save_weights(update)
    print(f"{losses[-1]:.4f}", flush=True)

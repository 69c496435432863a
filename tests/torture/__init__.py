"""Reliability, in figures: `python -m tests.torture`, or `make torture`.

work.py      many trials on all cores, each in a process that may crash, hang or ask for too much memory
crashes.py   kill -9, power cuts, disks that refuse
inputs.py    garbage on standard input, MQTT and HTTP
mutations.py adapter, base, cache and ONNX files that hypothesis changes
streams.py   wrong labels, and a day's stream
privacy.py   what is wiped, and what the page lets strangers do

pytest runs a few trials of each (tests/test_torture.py); CI runs a twentieth.
"""

import os

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # every core has a process of its own

"""One update of the streaming ridge against fitting again, in one run.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --quick

LeNet-5's taps of Fashion-MNIST turned by 75°, records in memory; λ and weights as `fit_ridge` found them on T samples.

- one sample: `StreamingRidge.update` of one sample where about T samples are there.
- fitted again: the same samples at the same λ from nothing, `StreamingRidge.update` of all of them at once, which is
  their product, its factor and the maps.
- bounded support: the mean over one round, in which a quarter of T samples come and the oldest go once.
- `fit_ridge`: the whole adaptation, with the records, λ, weights and left-out scores.

Medians of interleaved rounds on one thread, and the ratios of the medians.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

from benchmarks.accuracy import TASKS, base, drifted, network
from benchmarks.common import clock, data_file, interleaved, machine, save_json, table, timed
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import get_engine
from instantft.solvers.records import Records
from instantft.solvers.ridge import fit_ridge
from instantft.solvers.streaming import ROOM, StreamingRidge

T = 1024
UPDATES = 8
"""Updates a round; the stream grows by so many, which is under 1 % of T a round."""
MOST = 1 / 20
"""Share of a refit that an update may take."""
TOLERANCE = 1e-4
"""How far the two may be apart, as in `solvers.streaming`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, on a machine that others use too")
    parser.add_argument("--quick", action="store_true", help="a network that was not trained, and few rounds")
    args = parser.parse_args()
    if args.cpu_time:
        clock.count_cpu()
    repeats = 2 if args.quick else args.repeats
    engine, task = get_engine(), TASKS["fashion"]
    spec = network(task)
    if args.quick and not data_file(task.file).is_file():
        print(f"Random numbers stand in for {data_file(task.file)}, which is not there.\n")
        rng = np.random.default_rng(0)
        x, y = rng.random((9000, 784), np.float32), rng.integers(0, 10, 9000).astype(np.int32)
    else:
        _, (x, y) = drifted(task, 0)
    net = Network.init(spec, 0) if args.quick else base(engine, "fashion", task, 0)
    first = fit_ridge(engine, net, x[:T], y[:T])
    total = T + (repeats + 1) * UPDATES
    records = Records(engine, net, x, np.arange(len(x)), None)
    records.keep()
    taps = [np.ascontiguousarray(tap) for tap in records.taps(slice(0, len(x)))]

    def part(start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
        return [tap[start:stop] for tap in taps], y[start:stop]

    growing = StreamingRidge(spec, first.choice)
    growing.update(*part(0, T))
    bounded = StreamingRidge(spec, first.choice, support=T)
    bounded.update(*part(0, T))

    def one_by_one(stream: StreamingRidge, start: int, count: int) -> float:
        """Mean seconds of an update."""
        samples = [part(start + i, start + i + 1) for i in range(count)]

        def job() -> None:
            for sample in samples:
                stream.update(*sample)

        return timed(job) / count

    def one() -> float:
        return one_by_one(growing, growing.seen, UPDATES)

    def again() -> float:
        return timed(lambda: StreamingRidge(spec, first.choice).update(*part(0, T)))

    def cycle() -> float:
        count = int((ROOM - 1) * T)
        return one_by_one(bounded, bounded.seen % (len(x) - count), count)

    def whole() -> float:
        store = memory_store("fp32", spec.record, T)
        return timed(lambda: fit_ridge(engine, net, x[:T], y[:T], store=store))

    jobs = {"one sample": one, "one sample, bounded support": cycle, "fitted again": again, "fit_ridge": whole}
    medians = {name: statistics.median(seconds) for name, seconds in interleaved(jobs, repeats).items()}
    anew = StreamingRidge(spec, first.choice)
    anew.update(*part(0, total))
    difference = float(np.abs(growing.W - anew.W).max() / np.abs(anew.W).max())
    rows = [
        [name, f"{1000 * s:.2f}", f"1/{medians['fitted again'] / s:.1f}", f"1/{medians['fit_ridge'] / s:.1f}"]
        for name, s in medians.items()
    ]
    print(table([f"T={T}, {clock.name} time", "ms", "of fitting again", "of fit_ridge"], rows))
    ratio = medians["one sample"] / medians["fitted again"]
    verdict = "at most" if ratio <= MOST else "NOT at most"
    print(f"\nOne update is 1/{1 / ratio:.1f} of fitting again, {verdict} 1/{1 / MOST:g}.")
    verdict = "within" if difference <= TOLERANCE else "NOT within"
    print(f"After {total - T} updates W is off by {difference:.1e} of its largest value, {verdict} {TOLERANCE:g}.")
    save_json(args.json, {"machine": machine(), "seconds": medians, "difference": difference})


if __name__ == "__main__":
    main()

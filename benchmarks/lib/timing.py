"""Times of calls that take turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Seconds(NamedTuple):
    """Of one call: on the clock, and of the processor, of all threads together."""

    clock: float
    processor: float


def seconds(call: Callable[[], Any]) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1, seed: int = 0
) -> dict[str, list[Seconds]]:
    """Times one call each per round, in another order in every round.

    Args:
        calls: what is timed, by name.
        rounds: how many times are returned for each.
        warm_up: rounds before these, which do not count.
        seed: of the order.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(seed)
    for number in range(-warm_up, rounds):
        rng.shuffle(order)
        for name in order:
            found = seconds(calls[name])
            if number >= 0:
                times[name].append(found)
    return times


def by_kind(times: Sequence[Seconds]) -> dict[str, list[float]]:
    """Returns {"clock": [...], "processor": [...]}."""
    return {kind: [getattr(one, kind) for one in times] for kind in Seconds._fields}


def ratio(times: Sequence[float], peer: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median of the ratios of the rounds, and their quartiles."""
    low, middle, high = np.percentile(np.divide(times, peer), [25, 50, 75])
    return float(middle), float(low), float(high)

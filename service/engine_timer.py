"""The timer of engine runs, used by warm-up, the engine limit and `export profile`. It returns raw seconds."""

import time
from collections.abc import Callable


def time_runs(
    run: Callable[[], object],
    *,
    seconds: float,
    max_runs: int | None = None,
    warm_up_runs: int = 1,
    on_thread: Callable[[Callable[[], float]], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Time runs until together they take `seconds`, or there are `max_runs`, but at least one; returns each run's time.

    `warm_up_runs` come first and are not returned. `on_thread` calls a function on the thread where an engine has to
    run; it is called once per run, so that other work can run in between, and waiting for it is not counted.
    """

    def timed() -> float:
        started = clock()
        run()
        return clock() - started

    def once() -> float:
        return on_thread(timed) if on_thread else timed()

    for _ in range(warm_up_runs):
        once()
    taken = [once()]
    total = taken[0]
    while total < seconds and len(taken) != max_runs:
        taken.append(once())
        total += taken[-1]
    return taken

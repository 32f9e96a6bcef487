"""Where the time of a training step goes: `train.profile=true` writes a trace of a few steps and
prints the operations that take longest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile, schedule

from files import atomic_write
from training.run import Run

SETTLE = 10             # steps before the trace, in which kernels are compiled
TRACED = 3              # steps in the trace
LISTED = 8              # operations printed


@contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """Yields the function to call after each training step. With `train.profile` it drives a
    torch.profiler, which writes trace.json into the run directory.

    A run with few steps left is traced from an earlier step.
    """
    if not run.config.train.profile or not run.world.first:
        yield lambda: None
        return
    steps_left = run.config.train.steps - run.step
    traced = min(TRACED, steps_left)
    settle = min(SETTLE, steps_left - traced)
    first, path = run.step + settle + 1, run.folder / "trace.json"
    on_gpu = run.hardware.device.type == "cuda"

    def write(trace: profile) -> None:
        with run.untimed(), run.explained("writing the trace of"), atomic_write(path) as file:
            trace.export_chrome_trace(str(file.name))       # it opens the file of that name itself
        times: dict[str, tuple[float, int]] = {}            # microseconds and calls by operation
        for event in trace.key_averages():
            if not event.key.startswith("ProfilerStep"):
                time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                times[event.key] = (time, event.count)
        total = sum(time for time, _ in times.values())
        slowest = sorted(times.items(), key=lambda item: -item[1][0])[:LISTED]
        for name, (time, count) in slowest:
            run.say(f"  {time / total:5.1%}  {time / 1e3 / traced:7.2f} ms a step  "
                    f"{count / traced:6.0f} × {name}")
        run.say(f"profile    steps {first} to {first + traced - 1} in {path}: "
                "open it at https://ui.perfetto.dev")

    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    steps = schedule(wait=max(0, settle - 1), warmup=min(1, settle), active=traced, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step

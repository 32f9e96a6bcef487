"""Where the time of a training step goes: `train.profile=true` writes a trace of a few steps, and says what took longest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile, schedule

from files import atomic_write
from training.run import Run

SETTLE, TRACED, LISTED = 10, 3, 8       # steps before it, in which kernels are compiled; steps in the trace; operations named


@contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """What is to be called after each training step; where `train.profile` asks for it, it drives a torch.profiler.

    Writes trace.json into the run directory. A shorter run is traced from an earlier step.
    """
    if not run.config.train.profile or not run.world.first:
        yield lambda: None
        return
    left = run.config.train.steps - run.step
    traced = min(TRACED, left)
    settle = min(SETTLE, left - traced)
    first, path, on_gpu = run.step + settle + 1, run.folder / "trace.json", run.device.type == "cuda"

    def write(trace) -> None:
        with run.untimed(), run.explained("writing the trace of"), atomic_write(path) as file:
            trace.export_chrome_trace(str(file.name))           # it opens what has that name itself
        operations = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
                      for event in trace.key_averages() if not event.key.startswith("ProfilerStep")}
        together = sum(time for time, _ in operations.values())
        for name, (time, count) in sorted(operations.items(), key=lambda item: -item[1][0])[:LISTED]:
            run.say(f"  {time / together:5.1%}  {time / 1e3 / traced:7.2f} ms a step  {count / traced:6.0f} × {name}")
        run.say(f"profile    steps {first} to {first + traced - 1} in {path}: open it at https://ui.perfetto.dev")

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    steps = schedule(wait=max(0, settle - 1), warmup=min(1, settle), active=traced, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step

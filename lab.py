"""The project in Python, in a notebook or a script: train a run, open it, look at it.

    import lab
    run = lab.train("configs/quickstart.yaml", "train.steps=1000")
    lab.scores(run)["L1H3"]["prefix_matching"]

docs/python.md has an example of each function. They do what train.py, sample.py and heads.py do,
and give the same numbers. A mistake raises errors.UserError, which says how to mend it.
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import own_modules  # noqa: F401   first: it says what is in the way of the others
from errors import UserError

from induction.ablation import Ablation, Method, chosen_heads
from induction.ablation import ablate as ablate_on_probe
from induction.examine import Scores, judge_run, probes_for, scores_of
from induction.verdict import Verdict
from model.taps import Head
from train import train as train_job
from training.config import Config
from training.continuation import Options, Sampler
from training.loaded_run import LoadedRun, load_run
from training.resume import job_of
from training.world import join

__all__ = ["Ablation", "Config", "LoadedRun", "Scores", "UserError", "Verdict", "ablate",
           "load_run", "sample", "scores", "train", "verdict"]


def train(config: str | Path | Config, *overrides: str) -> LoadedRun:
    """Train as `python train.py CONFIG key.path=value …` does, and open the run at its newest
    checkpoint, on the CPU. A run that is finished is only opened.

    config      the path of a YAML file, that of a run to continue, or a Config
    overrides   "train.steps=500", "optimizer.lr=0.01", …

    Ctrl-C finishes the step and saves; the run is then returned as it is.
    """
    if not isinstance(config, str | Path | Config):
        raise UserError(f"a {type(config).__name__} is no config: name a YAML file or a run, or "
                        "give a lab.Config")
    world = join()
    job = job_of(config, overrides)
    if not (job.config.checkpoint.every or job.config.checkpoint.steps):
        raise UserError("checkpoint.every=0 saves no checkpoint, so there would be none to open\n"
                        "  leave it out")
    train_job(job, world)
    world.close()
    return load_run(job.folder)


Run = LoadedRun | str | Path        # a run that is open, or where it is


def opened(run: Run) -> LoadedRun:
    return run if isinstance(run, LoadedRun) else load_run(run)


def sample(run: Run, prompt: str = "", max_tokens: int = 200, temperature: float = 0.8, *,
           top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
           repetition_penalty: float = 1.0, seed: int = 0, stop: str | Sequence[str] = (),
           slide: bool = False) -> str:
    """The continuation of a prompt: what sample.py prints behind it with the same options."""
    run = opened(run)
    stops = [stop] if isinstance(stop, str) else stop
    options = Options(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stops,
                      slide)
    # sample.py packs the weights, which must not change afterwards. So a copy of the model is
    # packed, which shares the taps that a caller has set.
    tapped = run.model.tapped
    model = copy.deepcopy(run.model, {id(tapped): tapped})
    sampler = Sampler(model.pack(), run.tokenizer, options)
    return sampler.complete([sampler.encode(prompt)])[0].text


def scores(run: Run) -> Scores:
    """The scores of every head, `scores(run)["L1H3"]["prefix_matching"]`: the numbers of
    `heads.py RUN --json`. docs/heads.md explains each."""
    return scores_of(opened(run))


def ablate(run: Run, heads: str | Head | Iterable[str | Head],
           kind: Method = "mean") -> Ablation:
    """What the model loses without some heads, on the rows of repeated random tokens on which
    heads.py scores them: its losses with and without them, and the fraction of the repeat gain
    that is removed.

    heads   "L1H3", "L1" (all of the layer), or several
    kind    what they write instead: "mean" (their mean over the rows), "zero", or "resample" (what
            they write on another row of the same period)
    """
    run = opened(run)
    several = [heads] if isinstance(heads, str | Head) else heads
    names = ",".join(map(str, several))
    chosen = chosen_heads(names, run.model.config) if names else []
    return ablate_on_probe(run.model, chosen, probes_for(run).scored, kind)


def verdict(run: Run) -> Verdict:
    """Did induction heads form? The verdict of `heads.py verdict RUN`, with its evidence."""
    return judge_run(opened(run))

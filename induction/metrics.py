"""The names of this package's metrics in metrics.jsonl and wandb, for the code that writes them and
the code that reads them. docs/heads.md explains each."""

from collections.abc import Mapping

from model.taps import Head

LOSS_FIRST = "repeat/loss_first"        # nats per token in the first copy of random tokens
LOSS_SECOND = "repeat/loss_second"      # in the second copy
GAIN = "repeat/gain"                    # the first minus the second: what repeating is worth
ACCURACY = "aperiodic/accuracy"         # of the known tokens of the aperiodic probe, on rows behind
                                        # the token that begins a text
ACCURACY_BARE = "aperiodic/accuracy_without_begin"      # the same rows without it
KNOWN_LOSS = "aperiodic/loss_known"     # nats per known token, over both kinds of rows
KNOCKOUT = "knockout/gain_removed"      # fraction of the repeat gain lost without the induction
                                        # edges of all heads
KNOCKOUT_RANDOM = "knockout/gain_removed_random"        # without as many random edges
ICL_SCORE = "icl/score"                 # loss late in the context minus loss early, on text
ONSET_TOKENS = "phase/onset_tokens"     # tokens seen when prefix matching began to rise


def score_key(score: str, head: Head) -> str:
    """The name of one head's score: heads/prefix_matching/L1H3."""
    return f"heads/{score}/{head}"


def offset_profile_key(head: Head) -> str:
    """The name of one head's offset profile: heads/offset_profile/L1H3."""
    return score_key("offset_profile", head)


def best_key(score: str) -> str:
    """The name of a score's largest value over all heads."""
    return f"heads/best/{score}"


def layers_key(score: str) -> str:
    """The name of a score's largest value in each layer, a list."""
    return f"heads/layers/{score}"


def scores_by_head(record: Mapping, score: str) -> dict[str, float]:
    """One score in a record of metrics.jsonl: {"L1H3": 0.95, …}. A null is left out."""
    prefix = f"heads/{score}/"
    return {key.removeprefix(prefix): value for key, value in record.items()
            if key.startswith(prefix) and value is not None}

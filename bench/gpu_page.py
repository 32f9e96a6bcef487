"""The page of `python -m bench.gpu`: what its steps have left in a folder, as Markdown for docs/benchmarks.md."""

import json
from collections.abc import Iterator
from pathlib import Path


def page(folder: Path) -> str:
    """A table for each bench that has left its JSON there, after one of the steps."""
    parts = {"attention": attention, "attention_tiles": tiles, "train": train, "probe_overhead": probe, "sampling": sampling}
    found, failed = {}, []
    for name in ("steps", *parts):
        try:
            found[name] = json.loads((folder / f"{name}.json").read_text())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            failed.append(f"{name}.json could not be read: {error}")
    about = next((found[name] for name in parts if name in found and name != "probe_overhead"), {})
    names = [about.get("gpu") or about.get("device", "nothing has been measured"),
             *(f"{name} {about[name]}" for name in ("python", "torch", "triton") if name in about)]
    lines = ["# Measured on a GPU", "", ", ".join(names), *failed]
    if about.get("dry_run"):
        lines += ["", "**A dry run on tiny shapes: no time here means anything.**"]
    lines += ["", "## Steps", "", *table(("step", "exit code", "seconds", "its last line"), (
        (row["name"], "left out" if row["code"] is None else row["code"], row["seconds"], row["said"].replace("|", "\\|"))
        for row in found.get("steps", [])))]
    for name, part in parts.items():
        if name in found:
            try:
                lines += ["", *part(found[name])]
            except (KeyError, IndexError, TypeError) as error:      # of another version, or cut short
                lines += [f"{name}.json has no {error}"]
    return "\n".join(lines) + "\n"


def table(columns: tuple[str, ...], rows) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows)]


def attention(figures: dict) -> Iterator[str]:
    ceilings = figures["ceilings"]
    peers = list(dict.fromkeys(name for row in figures["rows"] for name in row["ms"] if name != "ours"))
    yield from ("## Attention", "", f"Ceilings of the same run: a copy {ceilings['copy_gb_s']:,.0f} GB/s, a matrix product "
                f"{ceilings['matmul_tflops']:,.0f} TFLOP/s. Kernels by captured graphs; a ratio above 1 says that ours is faster.", "")
    yield from table(("T", "D", "H/K", "pass", "ours, ms", "TFLOP/s", *(f"{name} / ours" for name in peers), "a call of ours, ms"), (
        (row["T"], row["D"], row["groups"], row["pass"], f"{row['ms']['ours']:.3f}", f"{row['tflops']:.0f}",
         *(f"{row['ms'][name] / row['ms']['ours']:.2f}" if name in row["ms"] else "–" for name in peers), f"{row['call_ms']['ours']:.3f}")
        for row in figures["rows"]))
    yield from ("", "For how long a call keeps Python:", "")
    yield from table(("call", "µs"), ((name, f"{us:.0f}") for name, us in figures["host_us"].items()))
    if "statistics" not in figures:                         # the step ran out of time
        return
    window = figures["windows"]
    yield from ("", f"A window of {window['window']} at T {window['T']}: {window['faster']:.1f} × faster than full attention. Decoding, by "
                "what must be read:", "")
    yield from table(("B", "S", "K", "H/K", "D", "GB/s", "of a copy", "flash / ours", "ragged rows / equal rows"), (
        (*(row[name] for name in ("B", "S", "K", "groups", "D")), f"{row['gb_s']:.0f}", f"{row['share_of_copy']:.0%}",
         f"{row['ms']['flash'] / row['ms']['ours']:.2f}", f"{row['ms']['ours, ragged'] / row['ms']['ours']:.2f}")
        for row in figures["decode"]))
    yield from ("", "Statistics of all heads, beside the forward pass:", "")
    yield from table(("T", "D", "ms", "of the forward pass"), (
        (row["T"], row["D"], f"{row['ms']['statistics']:.3f}", f"{row['of_forward']:.2f}") for row in figures["statistics"]))


def tiles(figures: dict) -> Iterator[str]:
    yield from ("## Tiles", "", "Fastest first; the backward kernels are timed together, one of them changing.", "")
    yield from table(("kernel", "D", "rows × columns, warps, stages", "ms"), (
        (row["kernel"], row["D"], "{} × {}, {}, {}".format(*row["tile"][:4]), f"{row['ms']:.3f}")
        for row in sorted(figures["tiles"], key=lambda row: (row["kernel"], row["D"], row["ms"]))))


def train(figures: dict) -> Iterator[str]:
    yield from ("## A training step", "")
    shape = "{n_layers} layers, width {d_model}, {windows} × {n_ctx} tokens"
    yield from table(("shape", "arm", "ms", "tokens/s", "× plain", "of the matrix rate", "MB"), (
        (shape.format(**row["shape"]), name, f"{arm['ms']:.1f}", f"{arm['tokens_per_second']:,.0f}",
         f"{row['arms']['plain']['ms'] / arm['ms']:.2f}", f"{arm['of_matrix_rate']:.0%}", f"{arm['mb']:.0f}")
        for row in figures["rows"] for name, arm in row["arms"].items()))


def probe(figures: dict) -> Iterator[str]:
    yield from ("## What watching heads costs", "", f"{figures['config']}: {figures['share']:.2%} of training time.")


def sampling(figures: dict) -> Iterator[str]:
    yield from ("## Sampling", "")
    yield from table(("model", "rows", "context", "arm", "ms a step", "dynamic / it", "static / it", "it / floor"), (
        (row["model"], row["batch"], row["context"], name, f"{side['decode_ms']:.2f}",
         *(f"{row['sides'][cache]['decode_ms'] / side['decode_ms']:.2f}" for cache in ("dynamic", "static")),
         f"{side['decode_ms'] / row['floor_ms']:.2f}")
        for row in figures["rows"] for name, side in row["sides"].items() if name in ("ours", "compiled")))

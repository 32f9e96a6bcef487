"""The page of `python -m bench.gpu`: its figures as Markdown, for docs/benchmarks.md."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path


def page(folder: Path) -> str:
    """A table of the steps, and one for each bench that has written its JSON there."""
    parts = {"attention": attention, "attention_tiles": tiles, "train": train,
             "probe_overhead": probe, "sampling": sampling, "sampling_1b": sampling}
    figures, failed = {}, []
    for name in ("steps", *parts):
        try:
            figures[name] = json.loads((folder / f"{name}.json").read_text())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            failed.append(f"{name}.json could not be read: {error}")
    measured = [name for name in parts if name in figures and name != "probe_overhead"]
    about = figures[measured[0]] if measured else {}
    names = [about.get("gpu") or about.get("device", "nothing has been measured"),
             *(f"{name} {about[name]}" for name in ("python", "torch", "triton") if name in about)]
    lines = ["# Measured on a GPU", "", ", ".join(names), *failed]
    if about.get("dry_run"):
        lines += ["", "**A dry run on tiny shapes: no time here means anything.**"]
    lines += ["", "## Steps", "",
              *table(("step", "exit code", "seconds", "its last line"),
                     (step_cells(row) for row in figures.get("steps", [])))]
    for name, part in parts.items():
        if name in figures:
            try:
                lines += ["", *part(figures[name])]
            except (KeyError, IndexError, TypeError) as error:      # of another version, or cut off
                lines += [f"{name}.json has no {error}"]
    return "\n".join(lines) + "\n"


def table(columns: tuple[str, ...], rows: Iterable[tuple]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows)]


def step_cells(row: dict) -> tuple:
    code = "left out" if row["code"] is None else row["code"]
    return row["name"], code, row["seconds"], row["last_line"].replace("|", "\\|")


# --- a section for each bench: its lines, from the figures in its JSON ---

def attention(figures: dict) -> Iterator[str]:
    ceilings, rows = figures["ceilings"], figures["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "ours"))

    def cells(row: dict) -> tuple:
        ms = row["ms"]
        ratios = [f"{ms[name] / ms['ours']:.2f}" if name in ms else "–" for name in peers]
        return (row["T"], row["D"], row["groups"], row["pass"], f"{ms['ours']:.3f}",
                f"{row['tflops']:.0f}", *ratios, f"{row['call_ms']['ours']:.3f}")

    yield from ("## Attention", "",
                f"Ceilings of the same run: a copy {ceilings['copy_gb_s']:,.0f} GB/s, a matrix "
                f"product {ceilings['matmul_tflops']:,.0f} TFLOP/s. Kernels by captured graphs; a "
                "ratio above 1 says that ours is faster.", "")
    yield from table(("T", "D", "H/K", "pass", "ours, ms", "TFLOP/s",
                      *(f"{name} / ours" for name in peers), "a call of ours, ms"),
                     map(cells, rows))
    yield from ("", "For how long a call keeps Python:", "")
    yield from table(("call", "µs"),
                     ((name, f"{us:.0f}") for name, us in figures["host_us"].items()))
    if "statistics" not in figures:                         # the step ran out of time
        return
    window = figures["windows"]
    yield from ("", f"A window of {window['window']} at T {window['T']}: {window['faster']:.1f} × "
                "faster than full attention. Decoding, by what must be read:", "")
    yield from table(("B", "S", "K", "H/K", "D", "GB/s", "of a copy", "flash / ours",
                      "ragged rows / equal rows"), map(decode_cells, figures["decode"]))
    yield from ("", "Statistics of all heads, beside the forward pass:", "")
    yield from table(("T", "D", "tokens", "ms", "of the forward pass"), (
        (row["T"], row["D"], row["tokens"], f"{row['ms']:.3f}", f"{row['of_forward']:.2f}")
        for row in figures["statistics"]))


def decode_cells(row: dict) -> tuple:
    ms = row["ms"]
    return (*(row[name] for name in ("B", "S", "K", "groups", "D")), f"{row['gb_s']:.0f}",
            f"{row['share_of_copy']:.0%}", f"{ms['flash'] / ms['ours']:.2f}",
            f"{ms['ours, ragged'] / ms['ours']:.2f}")


def tiles(figures: dict) -> Iterator[str]:
    rows = sorted(figures["tiles"], key=lambda row: (row["kernel"], row["D"], row["ms"]))
    yield from ("## Tiles", "", "Fastest first; the backward kernels are timed together, one of "
                "them changing.", "")
    yield from table(("kernel", "D", "rows × columns, warps, stages", "ms"), (
        (row["kernel"], row["D"], "{} × {}, {}, {}".format(*row["tile"][:4]), f"{row['ms']:.3f}")
        for row in rows))


def train(figures: dict) -> Iterator[str]:
    shape = "{n_layers} layers, width {d_model}, {windows} × {n_ctx} tokens"
    rows = []
    for row in figures["rows"]:
        for name, arm in row["arms"].items():
            faster = row["arms"]["plain"]["ms"] / arm["ms"]
            rows.append((shape.format(**row["shape"]), name, f"{arm['ms']:.1f}",
                         f"{arm['in_a_row_ms']:.1f}", f"{arm['tokens_per_second']:,.0f}",
                         f"{faster:.2f}", f"{arm['of_matrix_rate']:.0%}", f"{arm['mb']:.0f}"))
    yield from ("## A training step", "")
    yield from table(("shape", "arm", "ms", "ms in a row", "tokens/s", "× plain",
                      "of the matrix rate", "MB"), rows)


def probe(figures: dict) -> Iterator[str]:
    yield from ("## What watching heads costs", "",
                f"{figures['config']}: {figures['share']:.2%} of training time.")


def sampling(figures: dict) -> Iterator[str]:
    rows = []
    for row in figures["rows"]:
        for name, side in row["sides"].items():
            if name in ("ours", "compiled"):
                ms = side["decode_ms"]
                ratios = [f"{row['sides'][cache]['decode_ms'] / ms:.2f}"
                          for cache in ("dynamic", "static")]
                rows.append((row["model"], row["batch"], row["context"], name, f"{ms:.2f}",
                             *ratios, f"{ms / row['floor_ms']:.2f}"))
    yield from ("## Sampling", "")
    yield from table(("model", "rows", "context", "arm", "ms a step", "dynamic / it", "static / it",
                      "it / floor"), rows)

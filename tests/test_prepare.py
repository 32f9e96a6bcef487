"""From text to shards: preparing continues and verifies, the split stays, files are taken as they stand."""

import contextlib
import csv
import gzip
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

from errors import UserError

import numpy as np
import pytest
from commands import command, fails, start

import data.encode
import data.prepare
import data.shards
from data.byte_bpe import bytes_tokenizer, train_bpe
from data.config import DataConfig
from data.corpus import PIECE_BYTES, TextCorpus
from data.prepare import is_validation, prepare
from data.shards import Shards, TokenStream


def data_config(**changes) -> DataConfig:
    return DataConfig(**({"corpus": "files", "files": ["texts/*.txt"], "tokenizer": {"kind": "bytes"}, "val_fraction": 0.2} | changes))


def documents(stream: TokenStream, end_of_text: int) -> list[list[int]]:
    tokens = stream.read(0, len(stream))
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == end_of_text))[1:]]


def test_every_document_is_there_once_and_begins_with_end_of_text(workplace):
    shards = Shards(prepare(data_config()))
    end = shards.tokenizer.begin
    both = documents(shards.train, end) + documents(shards.val, end)
    assert all(doc[0] == end for doc in both)
    assert sorted(shards.tokenizer.decode_bytes(doc) for doc in both) == sorted(p.read_bytes() for p in Path("texts").glob("*"))
    assert 0 < len(shards.val) < len(shards.train)


def test_the_split_stays_when_documents_are_added(workplace):
    def validation_texts() -> set[bytes]:
        shards = Shards(prepare(data_config()))
        return {shards.tokenizer.decode_bytes(doc) for doc in documents(shards.val, 256)}

    before = validation_texts()
    for n in range(10):
        Path(f"texts/aa{n}.txt").write_text(f"a new document {n}\n" * 20)
    after = validation_texts()
    assert before <= after and all(is_validation(text, 0.2) for text in after)


def test_a_finished_folder_is_left_alone_and_a_changed_text_is_noticed(workplace):
    folder = prepare(data_config())
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare(data_config()) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    Path("texts/abc.txt").write_text("changed")
    assert prepare(data_config()) != folder                 # beside it, so that a run that began with it can go on
    named = data_config(folder="mine")
    prepare(named)
    Path("texts/abc.txt").write_text("changed again")
    with pytest.raises(UserError, match="its text has changed since"):
        prepare(named)


def test_interrupted_preparation_continues_to_the_same_shards(workplace, monkeypatch):
    monkeypatch.setattr(data.prepare, "PART_BYTES", 20_000)
    whole = Shards(prepare(data_config(folder="whole")))
    assert len(whole.manifest["shards"]["train"]) > 3

    written, write = [], data.prepare._write_shards

    def break_down(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(data.prepare, "_write_shards", break_down)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_config(folder="broken"))
    with pytest.raises(UserError, match="no prepared corpus"):
        Shards("broken")
    first = (Path("broken") / "train-00000.npy").stat().st_mtime_ns
    monkeypatch.setattr(data.prepare, "_write_shards", write)
    assert Shards(prepare(data_config(folder="broken"))).hash == whole.hash
    assert (Path("broken") / "train-00000.npy").stat().st_mtime_ns == first         # not made again


def test_killed_preparation_continues(workplace):
    Path("texts/long.txt").write_text("\n".join(f"line {n} of a long text, {n * n}" for n in range(400_000)))
    Path("p.yaml").write_text("data: {corpus: files, files: [texts/*.txt], tokenizer: bytes, folder: out}")
    script = "import data.prepare as p; p.PART_BYTES = 500_000; from errors import run_command; run_command(p.main)"
    for kill in (True, True, True, False):
        before = len(list(Path("out").glob("train-*.npy")))
        process = start("-c", script, "p.yaml")
        while kill and process.poll() is None and len(list(Path("out").glob("train-*.npy"))) < before + 2:
            time.sleep(0.005)
        if kill:
            process.send_signal(signal.SIGKILL)
        ended = process.wait()
        if Path("out/manifest.json").exists():              # finished, or killed with nothing left to do
            Shards("out", verify=True)
    assert ended == 0
    shards = Shards("out", verify=True)
    end = shards.tokenizer.begin
    joined = b"".join(shards.tokenizer.decode_bytes(d) for d in documents(shards.train, end) + documents(shards.val, end))
    assert len(joined) == sum(p.stat().st_size for p in Path("texts").glob("*"))


def test_long_documents_are_cut_and_joined_again(workplace):
    text = ("".join(f"Zeile {n} – über 漢字\n" for n in range(8000))).encode()
    Path("texts/long.txt").write_bytes(text)
    corpus = TextCorpus(data_config(files=["texts/long.txt"]))
    pieces = list(corpus.pieces())
    assert b"".join(p.text for p in pieces) == text and [p.starts_document for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(len(p.text) <= 2 * PIECE_BYTES and p.text.decode() for p in pieces)
    shards = Shards(prepare(data_config(files=["texts/long.txt"])))
    cuts = sum(a != b for a, b in zip(*[[is_validation(p.text, 0.2) for p in pieces][n:] for n in (0, 1)])) + 1
    assert len(documents(shards.train, 256)) + len(documents(shards.val, 256)) == cuts      # seamless but where the split cuts


def test_one_line_without_an_end_is_cut_between_characters(workplace):
    Path("texts/line.txt").write_text("漢字" * 30_000)
    assert all(p.text.decode() for p in TextCorpus(data_config(files=["texts/line.txt"])).pieces())


def test_structured_files_are_read_by_datasets(workplace):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [f"document {n} says hello" for n in range(30)]
    with open("a.jsonl", "w") as file:
        file.writelines(json.dumps({"body": row, "n": 1}) + "\n" for row in rows)
    with gzip.open("a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": row, "n": 1}) + "\n" for row in rows)
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["body"], *([row] for row in rows)])
    pq.write_table(pa.table({"body": rows}), "a.parquet")
    with gzip.open("a.txt.gz", "wt") as file:
        file.write("plain text, compressed")
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        assert [p.text.decode() for p in TextCorpus(data_config(files=[name], column="body")).pieces()] == rows, name
    assert [p.text for p in TextCorpus(data_config(files=["a.txt.gz"])).pieces()] == [b"plain text, compressed"]
    with pytest.raises(UserError, match="no such column; there are body"):
        list(TextCorpus(data_config(files=["a.parquet"])).pieces())
    Path("b.jsonl").write_text("{broken")
    with pytest.raises(UserError, match=r"b\.jsonl"):
        list(TextCorpus(data_config(files=["b.jsonl"])).pieces())


def test_structured_text_is_taken_as_it_stands(workplace):
    Path("a.csv").write_text("n,text\n1,007\n2,NA\n3,1.10\n4,True\n")
    assert [p.text for p in TextCorpus(data_config(files=["a.csv"])).pieces()] == [b"007", b"NA", b"1.10", b"True"]
    Path("d[1].jsonl").write_text('{"text": "in brackets"}\n')
    Path("d1.jsonl").write_text('{"text": "another"}\n')
    assert [p.text for p in TextCorpus(data_config(files=["d[[]1].jsonl"])).pieces()] == [b"in brackets"]
    for name, content, words in (
            ("n.jsonl", b'{"text": [1]}\n', "not text"), ("e.jsonl", b"", "e.jsonl"), ("z.txt.zst", b"...", "unpack it"),
            ("b.txt.gz", gzip.compress(b"x" * 99)[:-9], "b.txt.gz"), ("c.txt.xz", b"no", "c.txt.xz")):
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            list(TextCorpus(data_config(files=[name])).pieces())


def test_nothing_of_the_users_is_ever_deleted(workplace):
    Path("mine").mkdir()
    Path("mine/thesis.json").write_text("{}")
    Path("empty.txt").write_text("")
    for files in (["texts/*.txt"], ["empty.txt"]):
        with pytest.raises(UserError, match="holds other files"):
            prepare(data_config(files=files, folder="mine"))
    with pytest.raises(UserError, match="holds other files"):
        prepare(data_config(folder="."))
    Path("void").mkdir()
    with pytest.raises(UserError, match="is empty"):
        prepare(data_config(files=["empty.txt"], folder="void"))
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.json"] and Path("void").is_dir()
    with pytest.raises(UserError, match="afile"):
        Path("afile").write_text("")
        prepare(data_config(folder="afile"))


def test_our_own_shards_are_not_read_as_text(workplace):
    first = prepare(data_config(files=["**/*"]))
    assert prepare(data_config(files=["**/*"])) == first


def test_a_text_that_falls_on_the_validation_side_alone_is_divided(workplace):
    text = next(t for n in range(10 ** 6) if is_validation(t := f"text {n} of one short file\n".encode() * 9, 0.05))
    Path("texts/one.txt").write_bytes(text)
    shards = Shards(prepare(data_config(files=["texts/one.txt"], val_fraction=0.05, tokenizer={"kind": "bpe", "vocab_size": 260})))
    joined = shards.tokenizer.decode_bytes(shards.train.read(0, 10 ** 4)) + shards.tokenizer.decode_bytes(shards.val.read(0, 10 ** 4))
    assert joined == text and len(shards.train) > len(shards.val) > 1


def test_a_tokenizer_given_by_its_path_is_known_by_its_content(workplace):
    Path("tk").mkdir()
    Path("tk/tokenizer.json").write_text(bytes_tokenizer().json)
    first = prepare(data_config(tokenizer={"kind": "./tk"}))
    assert prepare(data_config(tokenizer={"kind": "./tk"})) == first
    Path("tk/tokenizer.json").write_text(train_bpe(iter(["aa aa aa"]), 258).json)
    assert prepare(data_config(tokenizer={"kind": "./tk"})) != first


def test_parts_do_not_show(workplace, monkeypatch):
    Path("texts/long.txt").write_text("".join(f"line {n} of a document in many parts\n" for n in range(9000)))
    whole = Shards(prepare(data_config(folder="whole")))
    monkeypatch.setattr(data.prepare, "PART_BYTES", 50_000)
    parts = Shards(prepare(data_config(folder="parts")))
    assert len(parts.train.shards) > 4
    for a, b in ((whole.train, parts.train), (whole.val, parts.val)):
        assert (a.read(0, len(a)) == b.read(0, len(b))).all() and len(a) == len(b)


def test_more_shards_than_files_may_be_open(workplace, monkeypatch):
    resource = pytest.importorskip("resource")
    for n in range(80):
        Path(f"texts/short{n}.txt").write_text(f"line {n} of many short texts\n" * 40)
    monkeypatch.setattr(data.prepare, "PART_BYTES", 1000)
    folder = prepare(data_config())
    plenty = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(data.shards, "MAPPED", 8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, plenty[1]))
    try:
        shards = Shards(folder)
        assert len(shards.train.shards) > 40
        text = shards.train.read(0, len(shards.train))
        assert (shards.train.read(100, 5000) == text[100:5100]).all() and text[0] == 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, plenty)


def test_hub_datasets_go_through_the_same_code(workplace, monkeypatch):
    """The hub is not reached here: its `load_dataset` is given the same rows from a local file, all else is real."""
    import datasets
    import huggingface_hub
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"story {n} " * 30}) + "\n" for n in range(200)))
    local, asked = datasets.load_dataset, []

    def load(name, config, **options):
        asked.append((name, config, options["split"]))
        return local("json", data_files="rows.jsonl", **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = {"dataset": "someone/stories", "config": "small", "max_tokens": 20_000}
    shards = Shards(prepare(data_config(corpus="hub", files=[], hub=hub)))
    assert set(asked) == {("someone/stories", "small", "train")}
    assert 20_000 <= len(shards.train) + len(shards.val) < 21_000


def test_the_library_of_python_is_a_corpus():
    corpus = TextCorpus(DataConfig())
    assert corpus.size() > 5e6 and corpus.identity() == TextCorpus(DataConfig()).identity()
    names = {path.name for path in corpus.paths}
    assert {"argparse.py", "textwrap.py"} <= names and not any("/test/" in str(path) for path in corpus.paths)


def test_a_small_text_still_has_something_held_out(workplace):
    Path("texts/tiny.txt").write_text("to be or not to be, that is the question\n" * 20)
    shards = Shards(prepare(data_config(files=["texts/tiny.txt"], val_fraction=0.1)))
    assert len(shards.val) == 82 + 1 and len(shards.train) == 821 - 82
    assert documents(shards.val, 256)[0][0] == 256


def test_nothing_to_read_is_an_error_and_leaves_nothing(workplace):
    Path("texts/empty.txt").write_text("")
    for config, words in ((data_config(files=["texts/empty.txt"]), "empty"), (data_config(files=["no/*.txt"]), "no file matches")):
        with pytest.raises(UserError, match=words):
            prepare(config)
    assert not Path("prepared").exists() or not list(Path("prepared").iterdir())


def test_a_file_that_another_process_renames_meanwhile_is_no_strangers(workplace, monkeypatch):
    Path("out").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / ".tokenizer.json.partial"]))     # listed, and gone
    prepare(data_config(folder="out"))


def test_eight_preparations_of_one_folder_make_it_once(workplace):
    Path("texts/long.txt").write_text("\n".join(f"line {n} of a long text, {n * n}" for n in range(100_000)))
    whole = Shards(prepare(data_config(folder="whole")))
    Path("p.yaml").write_text("data: {corpus: files, files: [texts/*.txt], tokenizer: bytes, folder: out, val_fraction: 0.2}")
    processes = [start("-m", "data.prepare", "p.yaml") for _ in range(8)]
    said = [(process.communicate()[0], process.returncode) for process in processes]
    assert Shards("out", verify=True).hash == whole.hash
    assert any(code == 0 for _, code in said)
    for error, code in said:                                # too early, or it was there already
        assert code == 0 or (code == 2 and "being prepared by another process (wait for it)" in error), error


@pytest.mark.parametrize("hub", ["refuses", "hangs up"])
def test_offline_a_hub_is_asked_once(workplace, hub):
    """`datasets` itself would ask again and again, for 24 s."""
    Path("h.yaml").write_text("data: {corpus: hub, hub: {dataset: someone/something}, tokenizer: bytes}")
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def hang_up() -> None:
            with contextlib.suppress(OSError):              # until the test shuts the server
                while True:
                    connection, _ = server.accept()
                    asked.extend(connection.recv(1000).split()[1:2])
                    connection.close()

        listener = threading.Thread(target=hang_up)
        listener.start()
        port = server.getsockname()[1] if hub == "hangs up" else 9
        done = command("-m data.prepare", "h.yaml", cwd=workplace, env={"HF_ENDPOINT": f"http://127.0.0.1:{port}"})
        server.shutdown(socket.SHUT_RDWR)
        listener.join()
    assert asked.count(b"/api/datasets/someone/something") == (hub == "hangs up"), asked
    fails(done, "someone/something", "cannot be reached")
    assert not list(Path("prepared").glob("*/manifest.json"))

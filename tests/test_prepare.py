"""From text to shards: preparing continues and verifies, the split stays, text is not changed."""

import contextlib
import csv
import gzip
import json
import os
import signal
import socket
import threading
import time
from itertools import pairwise
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
    values = {"corpus": "files", "files": ["texts/*.txt"], "tokenizer": {"kind": "bytes"},
              "val_fraction": 0.2}
    return DataConfig(**(values | changes))


def documents(stream: TokenStream, end_of_text: int) -> list[list[int]]:
    tokens = stream.read(0, len(stream))
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == end_of_text))[1:]]


def texts_of(pattern: str, column: str = "text") -> list[bytes]:
    """The pieces of the files that match."""
    corpus = TextCorpus(data_config(files=[pattern], column=column))
    return [piece.text for piece in corpus.pieces()]


def test_every_document_is_there_once_and_begins_with_end_of_text(workplace):
    shards = Shards(prepare(data_config()))
    end = shards.tokenizer.begin
    ids = documents(shards.train, end) + documents(shards.val, end)
    assert all(document[0] == end for document in ids)
    texts = sorted(shards.tokenizer.decode_bytes(document) for document in ids)
    assert texts == sorted(path.read_bytes() for path in Path("texts").glob("*"))
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
    assert prepare(data_config()) != folder         # another one: a run may still use the first
    named = data_config(folder="mine")
    prepare(named)
    Path("texts/abc.txt").write_text("changed again")
    with pytest.raises(UserError, match="its text has changed since"):
        prepare(named)


def test_interrupted_preparation_continues_to_the_same_shards(workplace, monkeypatch):
    monkeypatch.setattr(data.prepare, "PART_BYTES", 20_000)
    uninterrupted = Shards(prepare(data_config(folder="uninterrupted")))
    assert len(uninterrupted.manifest["shards"]["train"]) > 3

    parts, write_shards = [], data.prepare._write_shards

    def interrupt_third(*arguments):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(arguments)
        return write_shards(*arguments)

    monkeypatch.setattr(data.prepare, "_write_shards", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_config(folder="broken"))
    with pytest.raises(UserError, match="no prepared corpus"):
        Shards("broken")
    first = (Path("broken") / "train-00000.npy").stat().st_mtime_ns
    monkeypatch.setattr(data.prepare, "_write_shards", write_shards)
    assert Shards(prepare(data_config(folder="broken"))).hash == uninterrupted.hash
    assert (Path("broken") / "train-00000.npy").stat().st_mtime_ns == first         # not made again


def test_killed_preparation_continues(workplace):
    lines = [f"line {n} of a long text, {n * n}" for n in range(400_000)]
    Path("texts/long.txt").write_text("\n".join(lines))
    Path("p.yaml").write_text(
        "data: {corpus: files, files: [texts/*.txt], tokenizer: bytes, folder: out}")
    script = ("import data.prepare as p; p.PART_BYTES = 500_000; "
              "from errors import run_command; run_command(p.main)")

    def finished_parts() -> int:
        return len(list(Path("out").glob("train-*.npy")))

    for kill in (True, True, True, False):
        before = finished_parts()
        process = start("-c", script, "p.yaml")
        while kill and process.poll() is None and finished_parts() < before + 2:
            time.sleep(0.005)
        if kill:
            process.send_signal(signal.SIGKILL)
        returncode = process.wait()
        if Path("out/manifest.json").exists():          # finished, or killed after the last step
            Shards("out", verify=True)
    assert returncode == 0
    shards = Shards("out", verify=True)
    end = shards.tokenizer.begin
    ids = documents(shards.train, end) + documents(shards.val, end)
    text_bytes = sum(len(shards.tokenizer.decode_bytes(document)) for document in ids)
    assert text_bytes == sum(path.stat().st_size for path in Path("texts").glob("*"))


def test_long_documents_are_cut_and_joined_again(workplace):
    text = ("".join(f"Zeile {n} – über 漢字\n" for n in range(8000))).encode()
    Path("texts/long.txt").write_bytes(text)
    corpus = TextCorpus(data_config(files=["texts/long.txt"]))
    pieces = list(corpus.pieces())
    assert b"".join(piece.text for piece in pieces) == text
    assert pieces[0].starts_document and not any(piece.starts_document for piece in pieces[1:])
    assert all(len(piece.text) <= 2 * PIECE_BYTES and piece.text.decode() for piece in pieces)
    shards = Shards(prepare(data_config(files=["texts/long.txt"])))
    held_out = [is_validation(piece.text, 0.2) for piece in pieces]
    changes = sum(a != b for a, b in pairwise(held_out))        # of the split: only there it is cut
    assert len(documents(shards.train, 256)) + len(documents(shards.val, 256)) == changes + 1


def test_one_line_without_an_end_is_cut_between_characters(workplace):
    Path("texts/line.txt").write_text("漢字" * 30_000)
    pieces = TextCorpus(data_config(files=["texts/line.txt"])).pieces()
    assert all(piece.text.decode() for piece in pieces)


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
        assert texts_of(name, column="body") == [row.encode() for row in rows], name
    assert texts_of("a.txt.gz") == [b"plain text, compressed"]
    with pytest.raises(UserError, match="no such column; there are body"):
        texts_of("a.parquet")
    Path("b.jsonl").write_text("{broken")
    with pytest.raises(UserError, match=r"b\.jsonl"):
        texts_of("b.jsonl")


def test_structured_text_is_not_converted(workplace):
    Path("a.csv").write_text("n,text\n1,007\n2,NA\n3,1.10\n4,True\n")
    assert texts_of("a.csv") == [b"007", b"NA", b"1.10", b"True"]
    Path("d[1].jsonl").write_text('{"text": "in brackets"}\n')
    Path("d1.jsonl").write_text('{"text": "another"}\n')
    assert texts_of("d[[]1].jsonl") == [b"in brackets"]


def test_files_that_hold_no_text_are_refused(workplace):
    for name, content, words in (
            ("n.jsonl", b'{"text": [1]}\n', "not text"), ("e.jsonl", b"", "e.jsonl"),
            ("z.txt.zst", b"...", "unpack it"), ("c.txt.xz", b"no", "c.txt.xz"),
            ("b.txt.gz", gzip.compress(b"x" * 99)[:-9], "b.txt.gz")):
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            texts_of(name)


def test_files_of_the_user_are_never_deleted(workplace):
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


def test_a_text_that_is_all_in_the_validation_split_is_divided(workplace):
    texts = (f"text {n} of one short file\n".encode() * 9 for n in range(10 ** 6))
    text = next(text for text in texts if is_validation(text, 0.05))
    Path("texts/one.txt").write_bytes(text)
    shards = Shards(prepare(data_config(files=["texts/one.txt"], val_fraction=0.05,
                                        tokenizer={"kind": "bpe", "vocab_size": 260})))
    ids = [*shards.train.read(0, 10 ** 4), *shards.val.read(0, 10 ** 4)]
    assert shards.tokenizer.decode_bytes(ids) == text and len(shards.train) > len(shards.val) > 1


def test_a_tokenizer_given_by_its_path_is_known_by_its_content(workplace):
    Path("tk").mkdir()
    Path("tk/tokenizer.json").write_text(bytes_tokenizer().json)
    first = prepare(data_config(tokenizer={"kind": "./tk"}))
    assert prepare(data_config(tokenizer={"kind": "./tk"})) == first
    Path("tk/tokenizer.json").write_text(train_bpe(iter(["aa aa aa"]), 258).json)
    assert prepare(data_config(tokenizer={"kind": "./tk"})) != first


def test_parts_do_not_show(workplace, monkeypatch):
    lines = [f"line {n} of a document in many parts\n" for n in range(9000)]
    Path("texts/long.txt").write_text("".join(lines))
    one_part = Shards(prepare(data_config(folder="one_part")))
    monkeypatch.setattr(data.prepare, "PART_BYTES", 50_000)
    parts = Shards(prepare(data_config(folder="parts")))
    assert len(parts.train.shards) > 4
    for a, b in ((one_part.train, parts.train), (one_part.val, parts.val)):
        assert (a.read(0, len(a)) == b.read(0, len(b))).all() and len(a) == len(b)


def test_more_shards_than_files_may_be_open(workplace, monkeypatch):
    resource = pytest.importorskip("resource")
    for n in range(80):
        Path(f"texts/short{n}.txt").write_text(f"line {n} of many short texts\n" * 40)
    monkeypatch.setattr(data.prepare, "PART_BYTES", 1000)
    folder = prepare(data_config())
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(data.shards, "MAPPED", 8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, hard_limit))
    try:
        shards = Shards(folder)
        assert len(shards.train.shards) > 40
        text = shards.train.read(0, len(shards.train))
        assert (shards.train.read(100, 5000) == text[100:5100]).all() and text[0] == 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))


def test_hub_datasets_go_through_the_same_code(workplace, monkeypatch):
    """Without the hub: `load_dataset` reads the same rows from a local file. The rest is real."""
    import datasets
    import huggingface_hub
    rows = [json.dumps({"text": f"story {n} " * 30}) + "\n" for n in range(200)]
    Path("rows.jsonl").write_text("".join(rows))
    load_dataset, requests = datasets.load_dataset, []

    def load(name, config, **options):
        requests.append((name, config, options["split"]))
        return load_dataset("json", data_files="rows.jsonl", **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = {"dataset": "someone/stories", "config": "small", "max_tokens": 20_000}
    shards = Shards(prepare(data_config(corpus="hub", files=[], hub=hub)))
    assert set(requests) == {("someone/stories", "small", "train")}
    assert 20_000 <= len(shards.train) + len(shards.val) < 21_000


def test_the_library_of_python_is_a_corpus():
    corpus = TextCorpus(DataConfig())
    assert corpus.size() > 5e6 and corpus.identity() == TextCorpus(DataConfig()).identity()
    names = {path.name for path in corpus.paths}
    assert {"argparse.py", "textwrap.py"} <= names
    assert not any("/test/" in str(path) for path in corpus.paths)


def test_a_small_text_still_has_something_held_out(workplace):
    Path("texts/tiny.txt").write_text("to be or not to be, that is the question\n" * 20)
    shards = Shards(prepare(data_config(files=["texts/tiny.txt"], val_fraction=0.1)))
    assert len(shards.val) == 82 + 1 and len(shards.train) == 821 - 82
    assert documents(shards.val, 256)[0][0] == 256


def test_nothing_to_read_is_an_error_and_leaves_nothing(workplace):
    Path("texts/empty.txt").write_text("")
    for config, words in ((data_config(files=["texts/empty.txt"]), "empty"),
                          (data_config(files=["no/*.txt"]), "no file matches")):
        with pytest.raises(UserError, match=words):
            prepare(config)
    assert not Path("prepared").exists() or not list(Path("prepared").iterdir())


def test_a_file_that_another_process_is_renaming_is_not_foreign(workplace, monkeypatch):
    Path("out").mkdir()
    listed_and_gone = ".tokenizer.json.partial"
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / listed_and_gone]))
    prepare(data_config(folder="out"))


def test_eight_preparations_of_one_folder_make_it_once(workplace):
    lines = [f"line {n} of a long text, {n * n}" for n in range(100_000)]
    Path("texts/long.txt").write_text("\n".join(lines))
    alone = Shards(prepare(data_config(folder="alone")))
    Path("p.yaml").write_text("data: {corpus: files, files: [texts/*.txt], tokenizer: bytes, "
                              "folder: out, val_fraction: 0.2}")
    processes = [start("-m", "data.prepare", "p.yaml") for _ in range(8)]
    outputs = [process.communicate()[0] for process in processes]
    assert Shards("out", verify=True).hash == alone.hash
    assert any(process.returncode == 0 for process in processes)
    for process, output in zip(processes, outputs):
        if process.returncode != 0:                     # it came while another one was preparing
            assert process.returncode == 2, output
            assert "being prepared by another process" in output, output


@pytest.mark.parametrize("hub", ["refuses", "hangs up"])
def test_offline_a_hub_is_asked_once(workplace, hub):
    """`datasets` itself would ask again and again, for 24 s."""
    Path("h.yaml").write_text(
        "data: {corpus: hub, hub: {dataset: someone/something}, tokenizer: bytes}")
    requests = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def hang_up() -> None:
            with contextlib.suppress(OSError):              # until the test shuts the server
                while True:
                    connection, _ = server.accept()
                    requests.extend(connection.recv(1000).split()[1:2])
                    connection.close()

        listener = threading.Thread(target=hang_up)
        listener.start()
        port = server.getsockname()[1] if hub == "hangs up" else 9
        done = command("-m data.prepare", "h.yaml", cwd=workplace,
                       env={"HF_ENDPOINT": f"http://127.0.0.1:{port}"})
        server.shutdown(socket.SHUT_RDWR)
        listener.join()
    expected = 1 if hub == "hangs up" else 0
    assert requests.count(b"/api/datasets/someone/something") == expected, requests
    fails(done, "someone/something", "cannot be reached")
    assert not list(Path("prepared").glob("*/manifest.json"))

"""Which files globs name, how their bytes become text, and shards whose text is gone."""

import codecs
import csv
import gzip
import io
import json
import os
import shutil
from pathlib import Path

from errors import UserError

import pytest
from commands import command, fails, succeeds
from conftest import metrics
from test_prepare import data_config, texts_of

from data.find_files import matching_files
from data.prepare import prepare
from data.shards import Shards

TEXT = "Zeile – 漢字 😀\n" * 2000
ENCODINGS = [("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE),
             ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-32-le", codecs.BOM_UTF32_LE),
             ("utf-32-be", codecs.BOM_UTF32_BE)]


def found(*patterns: str) -> list[str]:
    return sorted(os.path.relpath(path) for path in matching_files(patterns))


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"the text of {Path(name).name}")


# --- names ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["part[1]/book [2].txt", "a*b.txt", "what?.txt", "a::b.jsonl",
                                  "c#1/100%.csv", "d {x}/ü 漢.json", "~/x.txt", "**/y.txt",
                                  "-x.txt", "zip://a.jsonl", "hf:/a.csv"])
def test_an_existing_name_is_meant_literally(workplace, name):
    write("part1/book 2.txt", "aXb.txt", "whatX.txt")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    content = {".jsonl": '{"text": "words"}\n', ".json": '[{"text": "words"}]',
               ".csv": "text\nwords\n"}.get(Path(name).suffix, "words")
    Path(name).write_text(content)
    assert found(name) == [os.path.normpath(name)] and texts_of(name) == [b"words"]


def test_existing_folders_are_literal_and_other_brackets_are_wildcards(workplace):
    write("part[1]/a.txt", "part1/a.txt", "part2/a[1].txt", "part2/a1.txt", "part3/a1.txt")
    assert found("part[1]/*.txt") == ["part[1]/a.txt"]
    assert found("part[12]/a.txt") == ["part1/a.txt"]
    assert found("part[23]/a[1].txt") == ["part2/a[1].txt", "part3/a1.txt"]
    assert found("part[[]1]/*") == ["part[1]/a.txt"]


def test_globs_match_as_before(workplace, monkeypatch):
    write("d/a.txt", "d/b.md", "d/.hidden.txt", "d/.git/c.txt", "d/e/f/g.txt", "d/e/h.txt", "i.txt",
          "d/README")
    every = ["d/README", "d/a.txt", "d/b.md", "d/e/f/g.txt", "d/e/h.txt"]
    texts = ["d/a.txt", "d/e/f/g.txt", "d/e/h.txt"]
    assert found("d/**/*.txt") == found(f"{workplace}/d/**/**/*.txt") == texts
    assert found("d/**") == found("d/**/*") == every
    assert found("./d//*.txt", "d/../i.txt") == ["d/a.txt", "i.txt"]
    assert found("d/.*.txt") == ["d/.hidden.txt"] and found("d/**/f/*") == ["d/e/f/g.txt"]
    assert found("[di]*", "d/?.*") == ["d/a.txt", "d/b.md", "i.txt"]
    monkeypatch.setenv("HOME", str(workplace / "d"))
    assert found("~/*.md") == ["d/b.md"]
    for pattern, words in (("d", "it is a folder"), ("d/*.xyz", "searched from"), ("", "no file")):
        with pytest.raises(UserError, match=words):
            matching_files([pattern])


def test_link_loops_end_and_a_file_is_read_once(workplace):
    write("d/e/a.txt", "d/b.txt", "elsewhere/c.txt")
    for link, target in (("d/self", "."), ("d/e/up", ".."), ("d/e/d", "../../d"),
                         ("d/again.txt", "b.txt"), ("d/0", "e"), ("d/out", "../elsewhere"),
                         ("d/out2", "../elsewhere"), ("d/loop.txt", "loop.txt")):
        os.symlink(target, link)
    paths = matching_files(["d/**/*.txt", "d/self/**/b.txt"])
    assert sorted(os.path.realpath(path) for path in paths) == [
        str(workplace / name) for name in ("d/b.txt", "d/e/a.txt", "elsewhere/c.txt")]
    assert Path("d/e/a.txt") in paths           # by its own name, not by the link 0
    assert found("d/self/e/*.txt") == ["d/self/e/a.txt"]


# --- encodings ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("encoding", "mark"), ENCODINGS)
def test_text_after_a_byte_order_mark_is_decoded(workplace, encoding, mark):
    def write_encoded(name: str, text: str) -> None:
        Path(name).write_bytes(mark + text.encode(encoding))

    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([["text", "n"], [TEXT, "1"]])
    write_encoded("a.txt", TEXT)
    write_encoded("a.csv", rows.getvalue())
    write_encoded("a.jsonl", json.dumps({"text": TEXT}, ensure_ascii=False) + "\n")
    write_encoded("a.json", json.dumps([{"text": TEXT}], ensure_ascii=False))
    Path("b.txt.gz").write_bytes(gzip.compress(Path("a.txt").read_bytes()))
    Path("b.csv.gz").write_bytes(gzip.compress(Path("a.csv").read_bytes()))
    for name in ("a.txt", "a.csv", "a.jsonl", "a.json", "b.txt.gz", "b.csv.gz"):
        assert b"".join(texts_of(name)).decode() == TEXT, name


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_refused(workplace, encoding):
    for name, text in (("a.txt", "some plain text\n"), ("a.csv", "text,n\r\na,1\r\n"),
                       ("a.jsonl", '{"text": "é"}\n'), ("b.txt", "word 😀 " * 1000)):
        Path(name).write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=f"{name}: looks like UTF-16 or UTF-32"):
            texts_of(name)


def test_text_that_breaks_its_mark_is_refused(workplace):
    for content in (codecs.BOM_UTF16_LE + "abc".encode("utf-16-le") + b"x",
                    codecs.BOM_UTF16_BE + b"\xd8\x3d\x00a", codecs.BOM_UTF32_LE + b"\xff" * 8):
        Path("a.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.txt: begins like utf-"):
            texts_of("a.txt")


def test_other_bytes_stay_as_they_are(workplace):
    for content in (b"caf\xe9 \xff\xfe\n", bytes(range(256)) * 9, b"\0\0\1\0\2\0\3\0" * 99,
                    b"a\0b words in C\0", "\ufeff".join("ab").encode()):
        Path("a.txt").write_bytes(content)
        assert b"".join(texts_of("a.txt")) == content


def test_prompts_have_no_byte_order_mark(trained, tmp_path):
    file = tmp_path / "prompts.txt"
    options = ("--max-tokens", "2", "--json", "--file", file)
    for encoding, mark in ENCODINGS:
        file.write_bytes(mark + "import os\r\né\n".encode(encoding))
        rows = json.loads(succeeds(command("sample.py", trained, *options)).stdout)
        assert [row["prompt"] for row in rows] == ["import os", "é"], encoding
        succeeds(command("heads.py", trained, "--file", file))
    done = command("sample.py", trained, "-", "--max-tokens", "2", "--json", input="\ufeffab")
    assert json.loads(succeeds(done).stdout)[0]["prompt"] == "ab"
    done = command("sample.py", trained, "--interactive", "--max-tokens", "2", input="\ufeffab\n")
    assert succeeds(done).stdout.startswith("ab")
    file.write_bytes("import os\n".encode("utf-16-le"))
    fails(command("sample.py", trained, *options), "prompts.txt", "UTF-16")


def test_json_is_valid_whatever_bytes_a_prompt_has(trained, tmp_path):
    """RFC 8259: JSON is UTF-8. A byte that is not is escaped, so that it can be had back."""
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n\xc3\xa9 \\ \"\n")
    done = command("sample.py", trained, "--max-tokens", "2", "--json", "--file",
                   tmp_path / "prompts.txt", env={"PYTHONIOENCODING": "utf-8:strict"})
    prompts = [row["prompt"] for row in json.loads(succeeds(done).stdout)]
    assert prompts == ["caf\udce9", 'é \\ "'] and "caf\\udce9" in done.stdout


# --- shards without their text --------------------------------------------------------------------

@pytest.mark.parametrize("folder", [None, "shards"])
def test_finished_shards_are_used_when_their_text_is_gone(workplace, folder, capsys):
    made = prepare(data_config(folder=folder))
    shutil.move("texts", "elsewhere")
    capsys.readouterr()
    assert prepare(data_config(folder=folder), verify=True) == made
    said = capsys.readouterr().err
    assert "'texts/*.txt'" in said and f"shards of this text are used, in {made}" in said
    for change in ({"val_fraction": 0.3}, {"files": ["text/*.txt"]}, {"column": "body"},
                   {"tokenizer": {"kind": "bpe", "vocab_size": 300}}):
        with pytest.raises(UserError, match="no file matches"):
            prepare(data_config(folder=folder, **change))
    (made / "manifest.json").rename(made / "journal.json")          # not finished
    with pytest.raises(UserError, match="no file matches"):
        prepare(data_config(folder=folder))


def test_one_of_several_shards_without_text_must_be_chosen(workplace):
    first = prepare(data_config())
    Path("texts/abc.txt").write_text("changed")
    second = prepare(data_config())
    shutil.rmtree("texts")
    with pytest.raises(UserError, match="choose one with") as raised:
        prepare(data_config())
    assert str(first) in str(raised.value) and str(second) in str(raised.value)
    assert prepare(data_config(folder=str(first))) == first


@pytest.mark.parametrize("folder", ["null", "shards"])
def test_a_run_goes_on_after_all_was_moved_and_the_text_is_gone(workplace, folder):
    train = ("train.py", "tiny.yaml", f"data.folder={folder}", "heads.every=0", "train.steps=6")
    succeeds(command(*train))
    moved = workplace / "moved"
    moved.mkdir()
    for name in ("runs", "prepared", "shards", "tiny.yaml"):
        if (workplace / name).exists():
            shutil.move(workplace / name, moved / name)
    shutil.rmtree("texts")
    done = command("train.py", "runs/tiny", "train.steps=8", cwd=moved)
    assert str(moved) in succeeds(done).stderr + done.stdout
    assert set(metrics(moved / "runs/tiny")) == set(range(1, 9))
    succeeds(command("train.py", *train[1:], "run=other", cwd=moved))


def test_a_moved_run_needs_its_own_shards(workplace):
    options = ("heads.every=0", "train.steps=6")
    succeeds(command("train.py", "tiny.yaml", *options))
    own = next(Path("prepared").iterdir())
    Path("texts/abc.txt").write_text("another text altogether")
    other = prepare(data_config(tokenizer={"kind": "bpe", "vocab_size": 300}))
    assert other != own and Shards(other).hash != Shards(own).hash
    own.rename("prepared/0_renamed")
    done = command("train.py", "runs/tiny", "train.steps=7")
    assert "0_renamed" in succeeds(done).stdout + done.stderr
    shutil.rmtree("prepared/0_renamed")
    fails(command("train.py", "runs/tiny", "train.steps=8"), "other data")

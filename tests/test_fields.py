"""Files with fields: one column as it is, whatever the others hold; errors name the line."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

from errors import UserError

import pytest
from commands import command, fails, succeeds
from test_prepare import data_config, documents_in, texts_of

from data.prepare import prepare
from data.shards import Shards

TRICKY = ["NA", "null", "007", "1.10", "True", "2020-01-01", "2020-01-01T00:00:00Z", "1e5", "nan",
          'a "quoted" word', "two\nlines\r\nof text", "tab\there", "漢字 – é", " spaces ", "a,b"]


def write_json_lines(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: str, rows: list[list[str]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.endswith(".tsv") else ",").writerows(rows)


def write_arrow(path: str, columns: dict, stream: bool) -> None:
    import pyarrow as pa
    table = pa.table(columns)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def test_every_format_gives_the_same_texts_unconverted(workplace):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"n": 1, "text": text} for text in TRICKY]
    write_json_lines("a.jsonl", rows)
    Path("list.json").write_text(json.dumps(rows))
    Path("indented.json").write_text(json.dumps(rows, indent=1))
    Path("objects.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    Path("strings.json").write_text(json.dumps(TRICKY))
    for name in ("a.csv", "a.tsv"):
        write_csv(name, [["n", "text"], *(["1", text] for text in TRICKY)])
    for name, type_ in (("string", pa.string()), ("large", pa.large_string()),
                        ("codes", pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(pa.table({"n": [1] * len(TRICKY), "text": pa.array(TRICKY, type_)}),
                       f"{name}.parquet", row_group_size=4)
    write_arrow("stream.arrow", {"n": [1] * len(TRICKY), "text": TRICKY}, stream=True)
    write_arrow("file.arrow", {"n": [1] * len(TRICKY), "text": TRICKY}, stream=False)
    for source in ("a.jsonl", "list.json", "a.csv", "a.tsv"):
        raw = Path(source).read_bytes()
        for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress),
                                 (".xz", lzma.compress)):
            Path(source + suffix).write_bytes(compress(raw))
    names = [path.name for path in Path(".").iterdir() if path.suffix not in ("", ".yaml")]
    assert len(names) == 24
    for name in names:
        assert texts_of(name) == [text.encode() for text in TRICKY], name


def test_other_columns_hold_anything(workplace):
    """6,000 nulls and then a string: `datasets` took the type of a column from its first rows."""
    others = ["null"] * 6000 + ['"en"', "5", '[1, "x"]', '{"a": {"b": null}}', "9" * 5000, "NaN",
                                '"\\ud800"', '"2020-01-01"']
    lines = [f'{{"text": "document {n} {"x" * 2000}", "other": {other}}}\n'
             for n, other in enumerate(others)]
    Path("a.jsonl").write_text("".join([*lines, '{"other": "no text"}\n', "\n  \n"]))
    assert texts_of("a.jsonl") == [f"document {n} {'x' * 2000}".encode() for n in range(6008)]


def test_blank_lines_are_no_rows_but_quoted_blanks_are_text(workplace):
    Path("a.csv").write_text('\ntext\n\na\n  \n"  "\n"\n"\n""\n\u2028\nb')
    assert texts_of("a.csv") == [b"a", b"  ", b"\n", "\u2028".encode(), b"b"]
    Path("b.csv").write_text("n,text\r\n\r\n1,a\r\n \t \r\n2,\r\n3,b\r\n\r\n")
    assert texts_of("b.csv") == [b"a", b"b"]


def test_a_long_field_and_a_long_value_are_read(workplace):
    text = "word " * 100_000                            # csv refuses 128 kB by default
    write_csv("a.csv", [["text"], [text]])
    assert b"".join(texts_of("a.csv")) == text.encode()
    Path("a.json").write_text(json.dumps({"other": list(range(30_000)), "text": "x"}, indent=1))
    assert texts_of("a.json") == [b"x"]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.csv", b"text,label\n\na fox,1,\n", ("line 3", "a row of 3", "a header of 2")),
    ("a.csv", b'label,text\n1,"two\nlines"\n2\n', ("line 4", "a row of 1", "a header of 2")),
    ("a.tsv", b"text\tn\na\tb\tc\n", ("line 2", "a row of 3", "a header of 2")),
    ("a.csv", b'n,text\n1,"never ends\n2,foo\n', ("line 2", "never ends")),
    ("a.csv", b"n,text\n1,a\n2,b\xff\n", ("line 3", "UTF-8", "0xff")),
    ("a.csv", b"n,body\n1,a\n", ("data.column=text", "there are n, body")),
    ("a.csv", b"", ("is empty",)),
    ("a.jsonl", b'{"text": "a"}\n{broken\n{"text": "b"}\n', ("line 2", "not JSON")),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', ("line 4", "not JSON")),
    ("a.jsonl", b'{"text": "a"}\n{"text": "cut o', ("line 2", "not JSON")),
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', ("line 2", "data.column=text", "a number")),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', ("line 2", "not an object")),
    ("a.jsonl", b'{"text": "a", "text": "b"}\n', ("line 1", "there twice")),
    ("a.jsonl", b'{"body": "a"}\n{"id": 1}\n', ("data.column=text", "there are body, id")),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ("line 2", "UTF-8", "0xff")),
    ("a.json", b'[{"text": "a"},\n{"text": "b"}', ("not JSON",)),
    ("a.jsonl", b"[" * 10 ** 5, ("cannot be read as json",)),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], ("cannot be read",)),
    ("a.csv.xz", b"no", ("cannot be read",)),
    ("a.parquet", b"PAR1", ("cannot be read as parquet",)),
    ("a.arrow", b"nothing", ("cannot be read as arrow",)),
])
def test_what_cannot_be_read_is_named(workplace, name, content, words):
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        texts_of(name)
    message = str(raised.value)
    assert len(message.splitlines()) <= 2
    for word in (name, *words):
        assert word in message, message


def test_a_column_that_is_not_text_is_named_with_its_type(workplace):
    import pyarrow as pa
    import pyarrow.parquet as pq
    for column, words in (([["a"]], "list<"), ([b"a"], "binary"), ([1], "int64")):
        pq.write_table(pa.table({"text": column}), "a.parquet")
        write_arrow("a.arrow", {"text": column}, stream=True)
        for name in ("a.parquet", "a.arrow"):
            with pytest.raises(UserError, match=f"{name}: data.column=text: holds {words}"):
                texts_of(name)
    pq.write_table(pa.table({"body": ["a"], "text.x": ["b"]}), "a.parquet")
    assert texts_of("a.parquet", column="text.x") == [b"b"]
    with pytest.raises(UserError, match="no such column; there are body, text"):
        texts_of("a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), "a.parquet")
    assert texts_of("a.parquet") == []


def test_half_a_surrogate_pair_costs_one_character_and_is_said(workplace, capsys):
    Path("a.jsonl").write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d."}\n'
                               '{"text": "and \\ude00"}\n')
    expected = ["whole 😀".encode(), "half �.".encode(), "and �".encode()]
    assert texts_of("a.jsonl") == texts_of("a.jsonl") == expected
    assert capsys.readouterr().err.count("a.jsonl, line 2: half of a surrogate pair") == 1


def test_a_mistake_is_found_without_reading_on(workplace):
    """Only a value that its line does not finish needs the next one."""
    Path("a.jsonl").write_bytes(b'{"text": "a" "n": 1}\n{"text": "not UTF-8 \xff"}\n')
    with pytest.raises(UserError, match="line 1: is not JSON"):
        texts_of("a.jsonl")


def test_no_home_and_no_cache_are_needed(workplace):
    texts = [f"document {n} of forty" for n in range(40)]
    write_json_lines("a.jsonl", [{"text": text} for text in texts])
    write_csv("a.csv", [["text"], *([text] for text in texts)])
    for name in ("a.jsonl", "a.csv"):
        Path("p.yaml").write_text(f"data: {{corpus: files, files: [{name}], tokenizer: bytes}}")
        done = command("-m data.prepare", "p.yaml", cwd=workplace, env={"HOME": "/proc/none"})
        shards = Shards(succeeds(done).stdout.strip())
        assert documents_in(shards) == sorted(text.encode() for text in texts)


def test_a_csv_with_one_comma_too_many_is_refused_before_training(workplace):
    Path("a.csv").write_text("text,label\n" + "the quick brown fox,1,\n" * 40)
    Path("p.yaml").write_text("data: {corpus: files, files: [a.csv], tokenizer: bytes}")
    fails(command("-m data.prepare", "p.yaml", cwd=workplace), "a.csv, line 2", "3", "2")
    assert not list(Path("prepared").glob("*"))


def test_a_bomb_in_one_line_is_refused(workplace):
    line = b'{"text": "' + b" " * 2 ** 27 + b'"}\n'
    Path("a.jsonl.gz").write_bytes(gzip.compress(line, 1))
    with pytest.raises(UserError, match="expands to more than"):
        prepare(data_config(files=["a.jsonl.gz"]))

"""Every kind of file, whole and broken."""

import bz2
import errno
import gzip
import io
import json
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from mor_jax.data import compression
from mor_jax.data.inputs import open_sources
from mor_jax.data.readers import json_lines, read_documents
from mor_jax.errors import UserError

TEXTS = ["first text", "zweiter Text, größer", "third " * 2000]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}
PACKED = [suffix for suffix in COMPRESS if suffix]
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _texts(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(suffix, tmp_path):
    assert _texts(_write(tmp_path / f"a.b.jsonl{suffix}", COMPRESS[suffix](LINES))) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text(suffix, tmp_path):
    assert _texts(_write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix]("naïve\n\ntext\n".encode()))) == [
        "naïve\n\ntext\n"
    ]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("content", [LINES, ARRAY, b"\n" + ARRAY.replace(b"\n", b"")], ids=["lines", "array", "row"])
def test_json(content, suffix, tmp_path):
    assert _texts(_write(tmp_path / f"a.json{suffix}", COMPRESS[suffix](content))) == TEXTS


def test_one_json_object_may_be_spread_over_lines(tmp_path):
    assert _texts(_write(tmp_path / "a.json", b'{\n "text": "one"\n}\n')) == ["one"]


@pytest.mark.parametrize("name", ["A.JSONL", "a.Jsonl.GZ", "a.json.Gz", "A.TXT", "A.PARQUET"])
def test_suffixes_in_any_case(name, tmp_path):
    if name.endswith("PARQUET"):
        parquet.write_table(pa.table({"text": ["one"]}), tmp_path / name)
    else:
        data = b"one" if name.endswith("TXT") else b'{"text": "one"}'
        _write(tmp_path / name, gzip.compress(data) if name.lower().endswith("gz") else data)
    assert _texts(tmp_path / name) == ["one"]


@pytest.mark.parametrize("suffix", PACKED)
def test_several_compressed_streams(suffix, tmp_path):
    pack = COMPRESS[suffix]
    whole = pack(LINES[:20]) + pack(b"") + pack(LINES[20:])
    assert _texts(_write(tmp_path / f"a.jsonl{suffix}", whole)) == TEXTS
    assert _texts(_write(tmp_path / f"a.jsonl{suffix}", whole + bytes(70_000))) == TEXTS  # padded
    damaged = whole + pack(LINES)[:-9]  # Python's readers of .xz and .bz2 pass over a second stream with a bad start
    for data in (damaged, whole + b"something else"):
        with pytest.raises(UserError, match=f"truncated, damaged or not {suffix} data"):
            _texts(_write(tmp_path / f"a.jsonl{suffix}", data))


@pytest.mark.parametrize("name", ["a.xz", "a.bz2", "a.gz", "a.zst"])
def test_decompression_in_small_pieces(name, tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "_PIECE", 3)
    path = _write(tmp_path / name, COMPRESS[path_suffix := Path(name).suffix](LINES) * 2)
    with compression.open_bytes(path) as file:
        assert file.read() == LINES * 2, path_suffix


def test_a_long_zstd_window(tmp_path):
    """`zstd --long=31`, whose frames the library refuses unless told otherwise."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False)
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(LINES)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packer.compress(LINES) + packer.flush()  # of unknown length: the frame says its window
    assert zstandard.get_frame_parameters(data).window_size == 1 << 28
    assert _texts(_write(tmp_path / "a.jsonl.zst", data)) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_byte_order_marks(name, tmp_path):
    data = b"one" if name == "a.txt" else b'{"text": "one"}\n'
    assert _texts(_write(tmp_path / name, b"\xef\xbb\xbf" + data)) == ["one"]
    for codec, words in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        with pytest.raises(UserError, match=f"{name} is {words} text: convert it to UTF-8"):
            _texts(_write(tmp_path / name, data.decode().encode(codec)))


def test_joined_files_with_byte_order_marks(tmp_path):
    marked = b'\xef\xbb\xbf{"text": "one"}\n'
    assert _texts(_write(tmp_path / "a.jsonl", marked + marked)) == ["one", "one"]


def test_json_lines_give_numbers_and_objects(tmp_path):
    path = _write(tmp_path / "set.jsonl.gz", gzip.compress(b'{"a": 1}\n\n{"a": [2]}\n'))
    assert list(json_lines(path)) == [(1, {"a": 1}), (3, {"a": [2]})]
    _write(path, gzip.compress(b'{"a": 1}\n{"a": \n'))
    with pytest.raises(UserError, match=r"^--evalsets set\.jsonl\.gz, line 2: not a JSON object"):
        list(json_lines(path, "--evalsets set.jsonl.gz"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.parquet"])
def test_a_disk_that_fails_while_it_is_read(name, tmp_path, monkeypatch):
    path = _write(tmp_path / name, b"x")

    def fail(self, *_, **__):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(parquet.ParquetFile, "__init__", fail)
    with pytest.raises(UserError, match=re.escape(f"input {path} cannot be read: Input/output error")):
        _texts(path)


def test_a_file_that_vanishes(tmp_path):
    [source] = open_sources([str(_write(tmp_path / "a.jsonl", LINES))])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"input .*a\.jsonl cannot be read: No such file"):
        _ = source.hash
    with pytest.raises(UserError, match=r"input .*a\.jsonl: no such file"):
        list(source.documents())


def test_parquet(tmp_path):
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == TEXTS


def test_long_text_is_cut_at_blank_lines(tmp_path):
    text = ("a line of prose\n" * 99 + "\n") * 200
    documents = _texts(_write(tmp_path / "long.txt", text.encode()))
    assert len(documents) > 3 and "".join(documents) == text and all(d.endswith("\n\n") for d in documents)


def test_blank_documents_are_left_out(tmp_path):
    assert _texts(_write(tmp_path / "a.jsonl", b'{"text": " \\n"}\n\n{"text": "x"}\n')) == ["x"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n \n", "holds no text"),
        ("a.txt", b"text\0text", "NUL bytes"),
        ("a.txt", b"\x89PNG\xff\xfe", "not UTF-8"),
        ("a.pdf", b"text", "unknown kind of file"),
        ("a", b"text", "unknown kind of file"),
        ("a.jsonl", LINES[:-8], "line 3: not a JSON object .*truncated"),
        ("a.jsonl", b"\x89PNG\xff\xfe\n", "not UTF-8|not a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"content": "x"}\n', "line 1: the field 'text' is None"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' is 3"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: .*nested too deeply"),
        ("a.jsonl", LINES + b'{"text": "x", "meta": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_001, "line 4: .*deeply"),
        ("a.jsonl", LINES + b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 4: not a JSON object .*4300 digits"),
        ("a.jsonl", LINES + b'{"text": "\xff"}', "line 4 is not UTF-8 text .byte 0xff"),
        ("a.jsonl", LINES + b'{"text": null}', "line 4: the field 'text' is None, not a string"),
        ("a.jsonl", LINES + b'{"text": ["' + b"x" * 999 + b'"]}', "line 4: the field 'text' is .{9,99}, not a string"),
        ("a.jsonl", LINES + b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", r"line 4: the field 'text' is \[+\.\.\."),
        ("a.jsonl", b'{"text": "x", "source": "\\udc00"}\n', "line 1: the field 'source': .*lone surrogate"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), "line 1: not a JSON object .*NUL bytes"),
        ("a.jsonl", b"null\n", "line 1: not a JSON object"),
        ("a.jsonl", b"[\n", "line 1: not a JSON object"),
        ("a.json", ARRAY[:-8], "neither JSON lines nor one array of objects .*truncated"),
        ("a.json", b'[{"text": "x"}, 3]', "item 2: not a JSON object"),
        ("a.json", b'[{"text": "x"}, {"text": 3}]', "item 2: the field 'text' is 3"),
        ("a.json", b'{"content": "x"}', "line 1: the field 'text' is None"),
        ("a.json", b"[" * 100_000, "neither JSON lines nor one array of objects"),
        ("a.json", ARRAY + b"\xff", "line 11, is not UTF-8|not UTF-8"),
        ("a.json", b"[]", "holds no text"),
        ("a.txt", b"one\ntwo\n" + b"x\n" * 50_000 + b"caf\xe9\n", "line 50003, is not UTF-8 text .byte 0xe9"),
        ("a.txt.gz", gzip.compress(b"one\n" + b"\xff\n", mtime=0), "line 2, is not UTF-8"),
        ("a.parquet", b"PAR1 no", "truncated, damaged or not a parquet file"),
    ],
)
def test_bad_files(name, data, message, tmp_path):
    path = _write(tmp_path / name, data)
    with pytest.raises(UserError, match=message) as raised:
        _texts(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("suffix", PACKED)
def test_truncated_and_mislabelled_files(suffix, tmp_path):
    for data in (COMPRESS[suffix](LINES)[:-12], LINES):
        path = _write(tmp_path / f"a.jsonl{suffix}", data)
        with pytest.raises(UserError, match=re.escape(f"{path} is truncated, damaged or not {suffix} data")):
            _texts(path)


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip"])
def test_damaged_parquet_pages(codec, tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"row {i} of the table " * 9 for i in range(2000)]
    options = {"compression": codec, "row_group_size": 500, "use_dictionary": False}
    parquet.write_table(pa.table({"text": rows}), path, **options)
    whole = path.read_bytes()
    assert _texts(path) == rows
    start = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    for offset, count in ((start, 12), (start + 40, 400)) if codec != "none" else ((start, 12),):
        _write(path, whole[:offset] + b"\xff" * count + whole[offset + count :])
        with pytest.raises(UserError, match=r"a\.parquet(, after row \d+,)? is truncated, damaged or not a parquet"):
            _texts(path)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", None]), "row 2: the field 'text' is None"),
        (pa.array([1, 2]), "row 1: the field 'text' is 1, not a string"),
        (pa.array([b"a"]), "row 1: the field 'text' is b'a', not a string"),
        (pa.array([["a"]]), "row 1: the field 'text' is .'a'., not a string"),
        (pa.array([b"a", b"\xff"]).view(pa.string()), "row 2 is not UTF-8 text .byte 0xff"),
    ],
    ids=["null", "int", "binary", "list", "utf8"],
)
def test_parquet_columns_of_other_kinds(column, message, tmp_path):
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"text": column}), buffer)
    with pytest.raises(UserError, match=message):
        _texts(_write(tmp_path / "a.parquet", buffer.getvalue()))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_strings_of_other_layouts(kind, tmp_path):
    parquet.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == TEXTS


def test_parquet_without_text(tmp_path):
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text'"):
        _texts(tmp_path / "a.parquet")


def test_missing_inputs(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'x.txt'}: no such file")):
        open_sources([str(tmp_path / "x.txt")])
    with pytest.raises(UserError, match="a folder without data"):
        open_sources([str(tmp_path)])
    with pytest.raises(UserError, match="no input given"):
        open_sources([])

"""What the names of sources mean."""

import pytest

from mor_jax.data.inputs import open_sources, refuse_ambiguous, source_names
from mor_jax.errors import UserError

LINE = '{"text": "mine"}\n'


@pytest.mark.parametrize("name", ["docs", "embedded"])
def test_a_folder_with_the_name_of_a_built_in_source(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_sources([name])[0].name == open_sources([f"builtin:{name}"])[0].name == name
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.jsonl").write_text(LINE)
    with pytest.raises(UserError, match=rf"'\./{name}' for the folder or 'builtin:{name}' for the built-in one"):
        open_sources([name])
    with pytest.raises(UserError, match=f"data.source '{name}' is a built-in source, but a folder {name}/ is here"):
        refuse_ambiguous(name, "data.source")
    assert [source.name for source in open_sources([f"builtin:{name}"])] == [name]
    for spelling in (f"./{name}", f"{name}/", str(tmp_path / name)):
        assert [source.name for source in open_sources([spelling])] == ["mine.jsonl"]


def test_an_unknown_built_in_source():
    with pytest.raises(UserError, match="'builtin:doc' is not one of 'embedded', 'docs'; did you mean 'docs'"):
        open_sources(["builtin:doc"])


def test_kinds_are_checked_before_anything_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"a\.csv: unknown kind of file"):
        open_sources([str(tmp_path / "a.csv")])


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("one", ["one"]),
        ("one, two", ["one", "two"]),
        ("a,b", ["a,b"]),
        ("a,b,one", ["a,b", "one"]),
        ("c, d , one", ["c, d", "one"]),
        ("one,a,b,two", ["one", "a,b", "two"]),
        ("x,y", ["x", "y"]),  # as always where the parts are folders, whatever else is there
        ("docs,a,b", ["docs", "a,b"]),
        ("builtin:docs,tfds:set,one", ["builtin:docs", "tfds:set", "one"]),
        ("nowhere,one", ["nowhere", "one"]),
    ],
)
def test_commas_part_sources_unless_they_are_of_a_path(source, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two", "a,b", "c, d", "x", "y", "x,y"):
        (tmp_path / folder).mkdir()
    assert source_names(source) == names


@pytest.mark.parametrize("source", ["one,", ",one", "one,,two"])
def test_empty_entries(source):
    with pytest.raises(UserError, match="has an empty entry"):
        source_names(source)

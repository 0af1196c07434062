"""The embedded source: real modules, one side of the split each."""

import sys

import pytest

from mor_jax.data.embedded import EmbeddedSource, docs_source, module_docstrings
from mor_jax.data.spill import deal, read_bucket


@pytest.fixture(scope="module")
def documents():
    """Parsing the standard library takes seconds."""
    return list(EmbeddedSource().documents())


def test_standard_library(documents):
    source = EmbeddedSource()
    groups = [str(document.group) for document in documents]
    assert groups == sorted(groups) and len(set(groups)) == len(groups)
    assert {"json", "pydoc_data.topics.assert", "asyncio.tasks"} <= set(groups)
    assert not any("test" in group.split(".") for group in groups)
    assert 1.8e6 < sum(len(document.text.encode()) for document in documents) < 3e6
    assert len(source.hash) == 64 and source.hash == EmbeddedSource().hash


def test_nothing_is_imported():
    before = set(sys.modules)
    next(iter(EmbeddedSource().documents()))
    assert "antigravity" not in set(sys.modules) - before


def test_no_module_is_on_both_sides(documents, tmp_path):
    deal(
        lambda: documents,
        None,
        tmp_path / "buckets",
        seed=0,
        validation_share=0.12,
        train_buckets=2,
        validation_buckets=1,
    )
    sides = {
        s: {t for p in (tmp_path / "buckets").glob(f"{s}-*") for t in read_bucket(p)} for s in ("train", "validation")
    }
    assert not sides["train"] & sides["validation"]
    assert sides["train"] | sides["validation"] == {document.text for document in documents}
    sizes = {side: sum(map(len, texts)) for side, texts in sides.items()}
    assert 0.03 < sizes["validation"] / sum(sizes.values()) < 0.12


def test_docs_adds_packages_and_another_hash():
    source = docs_source()
    assert source.name == "docs" and source.size > EmbeddedSource().size
    assert source.hash != EmbeddedSource().hash
    groups = {module.partition(".")[0] for module, _ in source._files}
    assert {"jax", "numpy", "json"} <= groups


def test_docstrings_in_order_each_once(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n    def g(self):\n'
        '        """Method."""\nasync def h():\n    """Coroutine.\n\n    More."""\n'
    )
    assert module_docstrings(path) == "Module.\n\nClass.\n\nMethod.\n\nCoroutine.\n\nMore."
    path.write_text("not python (")
    assert module_docstrings(path) == ""

"""TFDS in both directions, without TensorFlow: text sets as a source, prepared corpora as a set."""

import sys
from typing import Any

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.data.corpus import open_corpus
from mor_jax.data.packed_rows import RowSource
from mor_jax.data.pipeline import make_dataset
from mor_jax.errors import UserError

CONTEXT = 32  # of the corpus fixtures
tfds: Any = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def text_set(tmp_path_factory):
    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"text": f"größer als {i} " * 9, "label": i}) for i in range(40))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_a_text_set_as_source(text_set, tmp_path):
    config = DataConfig(source=f"tfds:{text_set}", tokenizer="bytes", cache=str(tmp_path))
    dataset = make_dataset(config, context_length=CONTEXT, vocab_size=257, batch_size=4)
    assert "größer als" in dataset.tokenizer.decode(dataset.batch(0)["tokens"].ravel())
    assert "tensorflow" not in sys.modules


def test_a_set_without_text(corpus, tmp_path):
    from mor_jax.data.tfds_builder import MorPrepared

    builder = MorPrepared(corpus=corpus, data_dir=tmp_path)
    builder.download_and_prepare()
    with pytest.raises(UserError, match="needs a feature 'text'"):
        make_dataset(
            DataConfig(source=f"tfds:{builder.data_path}", cache=str(tmp_path / "cache")),
            context_length=CONTEXT,
            vocab_size=300,
            batch_size=4,
        )


def test_an_unknown_set(tmp_path):
    config = DataConfig(source="tfds:no_such_set_anywhere", cache=str(tmp_path))
    with pytest.raises(UserError, match=r"no_such_set_anywhere.* is not a set prepared as array_record"):
        make_dataset(config, context_length=CONTEXT, vocab_size=300, batch_size=4)


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tfds\]'"):
        make_dataset(DataConfig(source="tfds:x"), context_length=CONTEXT, vocab_size=300, batch_size=4)


def test_a_prepared_corpus_as_a_set(corpus, tmp_path):
    from mor_jax.data.tfds_builder import MorPrepared

    MorPrepared(corpus=corpus, data_dir=tmp_path).download_and_prepare()
    for split in ("train", "validation"):
        stored = tfds.data_source("mor_prepared", split=split, data_dir=tmp_path)
        opened = open_corpus(corpus)
        rows = RowSource(opened.paths(split), CONTEXT, CONTEXT)
        assert len(stored) == len(rows)
        for i in range(len(rows)):
            for name, values in rows[i].items():
                np.testing.assert_array_equal(stored[i][name], values)
    info = tfds.builder("mor_prepared", data_dir=tmp_path).info
    assert info.metadata["hash"] == opened.manifest.hash
    assert "tensorflow" not in sys.modules

"""A TFDS builder for prepared corpora, so that other TFDS users can read them; needs the extra ``tfds``, no TensorFlow.

This module imports ``tensorflow_datasets``; nothing else in the package imports it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import grain
import numpy as np
import tensorflow_datasets as tfds

from mor_jax.data.corpus import Corpus, open_corpus
from mor_jax.data.manifest import Split
from mor_jax.data.packed_rows import RowSource

_FEATURES = ("tokens", "segment_ids", "positions")


class MorPrepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The rows of a prepared corpus as a TFDS set stored as array_record.

    Read it with ``tfds.data_source("mor_prepared", split="train", data_dir=...)`` or
    ``tfds.builder_from_directory``: ``tokens``, ``segment_ids`` (1-based, 0 = padding) and ``positions``, each int32
    ``[context_length + 1]``; ``metadata.json`` carries the corpus's content hash and its tokenizer's.

    Args:
        corpus: folder of the prepared corpus.
        data_dir: folder of TFDS sets to write into.

    Raises:
        UserError: the folder is no sound prepared corpus.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. TFDS would look for checksums with importlib_resources, which it does not declare.
    url_infos = None

    def __init__(self, *, corpus: str | Path, data_dir: str | Path | None = None, **options: Any) -> None:
        self._corpus: Corpus = open_corpus(Path(corpus))
        super().__init__(data_dir=data_dir, file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        manifest = self._corpus.manifest
        shape = (manifest.settings.context_length + 1,)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Packed rows of {', '.join(manifest.settings.inputs)}, prepared by mor_jax.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Tensor(shape=shape, dtype=np.int32) for name in _FEATURES}
            ),
            metadata=tfds.core.MetadataDict({"hash": manifest.hash, "tokenizer_hash": manifest.tokenizer_hash}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        splits = [split for split in get_args(Split) if self._corpus.manifest.of(split)]
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        length = self._corpus.manifest.settings.context_length
        rows = RowSource(self._corpus.paths(split), length, length)
        yield from enumerate(grain.MapDataset.source(rows))

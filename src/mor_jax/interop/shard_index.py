"""The index of a sharded checkpoint: a JSON object whose `weight_map` names the file of every tensor."""

from pathlib import Path

from mor_jax.data.special_tokens import read_object
from mor_jax.errors import UserError, require


def indexed_files(path: Path) -> list[Path]:
    """Return the shards that an index names.

    Raises:
        UserError: it is no index, or a shard is not there.
    """
    values = read_object(path)
    try:
        names = sorted(set(values["weight_map"].values()))
        beside = all(name == Path(name).name for name in names)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of shards ({error!r})") from error
    require(beside, f"{path}: names files of other folders")
    missing = [name for name in names if not (path.parent / name).is_file()]
    require(not missing, f"{path} names shards that are not there: {', '.join(missing)}")
    return [path.parent / name for name in names]

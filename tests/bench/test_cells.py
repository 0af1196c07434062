"""experiments/serving/cells.py: trees are timed in turn, and the table has medians beside each other."""

import pytest

from experiment_script import load_script


@pytest.fixture(scope="module")
def cells():
    return load_script("serving/cells")


class _Worker:
    def __init__(self, tree, model):
        self.tree, self.model = tree, model


def test_trees_take_turns_and_change_places_in_the_second_round(cells):
    workers = [_Worker(tree, model) for model in ("a", "b") for tree in ("old", "new")]
    order = cells.in_turn(workers, [cells.parse_size("32"), cells.parse_size("8:int8")], rounds=2)
    told = [f"{nth} {cells.name(size)} {worker.model} {worker.tree}" for nth, size, worker in order]
    assert told[:4] == ["0 32 a old", "0 32 a new", "0 32 b old", "0 32 b new"]
    assert told[-4:] == ["1 8:int8 a new", "1 8:int8 a old", "1 8:int8 b new", "1 8:int8 b old"]
    assert len(told) == len(set(told)) == 16


def test_the_table_has_medians_and_leaves_out_what_was_not_timed(cells):
    def result(tree, rate, sequences="8"):
        return {"model": "m", "sequences": sequences, "tree": tree, "tokens_per_second": rate}

    times = {"first_token_ms": {"p50": 2.0, "p99": 40.0}}
    results = [result("old", 100), result("old", 300), result("new", 500) | times, result("old", 7, "8:int8")]
    head, _, *rows = cells.table({"results": results}).splitlines()
    assert head.startswith(
        "| model | sequences | tokens/s, old | tokens/s, new | new over old | first token, ms, p50 / p99, old |"
    )
    assert rows == [
        "| m | 8 | 200 | 500 | 2.50 |  | 2 / 40 |  |  |  |  |",
        "| m | 8:int8 | 7 |  |  |  |  |  |  |  |  |",
    ]

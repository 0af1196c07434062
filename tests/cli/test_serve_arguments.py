"""``mor serve`` refuses bad arguments in one line, and names the extra that is missing."""

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_flags_of_the_documentation_exist(mor):
    serves, measures = mor("serve", "--help"), mor("bench", "http", "--help")
    before, after = DOCS.read_text(encoding="utf-8").split("## Head to head")
    about, rest = after.split("\n## ", 1)
    flags, others = (set(re.findall(r"(?<=`)--[a-z.-]+", part)) for part in (before + rest, about))
    assert serves.code == measures.code == 0 and len(flags) >= 10 and others
    for flag in flags:
        assert f"{flag} " in serves.out, flag
    for flag in others:  # of the benchmark, or of the server beside it
        assert f"{flag} " in serves.out or re.search(rf"{flag}[ ,]", measures.out), flag


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere is no folder"),
        (("nowhere", "--port", "70000"), "port=70000 is outside 0..65535"),
        (("nowhere", "--max-queue", "-1"), "max_queue=-1 must not be negative"),
        (("nowhere", "--port", "0", "--mesh.data", "9"), "mesh.data=9 x mesh.tensor=1 = 9 devices, but there are 8"),
        (("nowhere", "--host", "no.such.host.invalid"), "host='no.such.host.invalid' port=8000: "),
    ],
)
def test_bad_arguments_are_one_line(mor, arguments, words):
    outcome = mor("serve", *arguments)
    assert outcome.code == 2 and words in outcome.err and outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err


@pytest.mark.parametrize("arguments", [("serve", "nowhere"), ("bench", "serve", "debug")])
@pytest.mark.parametrize("flag", [("--products", "xla"), ("--products=pallas",)])
def test_the_flag_of_kernels_that_are_gone_is_refused_with_the_reason(mor, arguments, flag):
    outcome = mor(*arguments, *flag)
    assert outcome.code == 2 and outcome.out == ""
    reason = "--products is gone: the kernels gained nothing over XLA's (experiments/serving/README.md)"
    assert outcome.err == f"mor {arguments[0]}: {reason}\n"


def test_a_missing_package_is_named(mor, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mor_jax.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = mor("serve", "nowhere")
    assert outcome.code == 2
    assert re.fullmatch(r"mor serve: the package \w+ is missing: pip install -e '\.\[serve\]'\n", outcome.err)

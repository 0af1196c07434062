"""Time every layout on one host's cards within a time, the most telling first; one JSON file per case in --out.

    python experiments/scaling/scale.py --cards 2 --seconds 560 --out OUT            # the same command goes on later
    python experiments/scaling/scale.py --cards 8 --cpu --sizes debug --out OUT      # eight fake CPU devices
    python experiments/scaling/scaling_table.py OUT

A case has processes of its own and is timed as `mor bench train` does. Efficiency is against one card in the same start
of the script. A failure is a result: delete its file to try again.
"""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from layouts import Case, ranked
from one_case import time_case

from mor_jax.config.io import to_dict
from mor_jax.errors import require
from mor_jax.sweep.results import write_json


@dataclass(frozen=True)
class Options:
    """Options of the script."""

    cards: int = 1
    """The largest number of cards; smaller ones come after it."""
    seconds: float = 560.0
    """From the start to the end; no case is started that is not expected to end by then."""
    out: Path = Path("runs/scaling")
    """Folder of the results; what is there is not timed again."""
    sizes: tuple[Literal["360m", "1.7b", "debug"], ...] = ("360m", "1.7b")
    """Models, the most telling first."""
    cpu: bool = False
    """Fake CPU devices in the cards' place: shows that it runs, and no efficiency."""
    only: str = ""
    """Only cases whose name contains this, and the one card that they are measured against."""
    steps: int = 20
    """Steps timed."""

    def __post_init__(self) -> None:
        for name in ("cards", "seconds", "steps"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")

    @property
    def command(self) -> str:
        """What was asked, without the folders of this machine."""
        numbers = f"--cards {self.cards} --seconds {self.seconds:g} --steps {self.steps} --sizes {' '.join(self.sizes)}"
        more = [*(["--cpu"] if self.cpu else []), *(["--only", self.only] if self.only else [])]
        return " ".join(["python experiments/scaling/scale.py", numbers, *more, "--out", self.out.name])


class Session:
    """One start of the script."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._end = time.monotonic() + options.seconds
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._one_card: dict[Case, float] = {}
        self._slower = 1.0

    def file_of(self, case: Case) -> Path:
        """Where a case's result is, or will be."""
        return self._options.out / f"{case.name}.json"

    def run(self, case: Case) -> None:
        """Time a case, and before it the one card that it is measured against, unless there is no time for both."""
        missing = {case, case.one_card} - self._one_card.keys()
        expected = self._slower * sum(each.stated_seconds() for each in missing)
        if expected > self._left():
            print(f"{case.name}: not started, {expected:.0f} s needed, {self._left():.0f} s left", flush=True)
            return
        if case.one_card in missing and case.cards > 1:
            self._time(case.one_card)
        if case.cards > 1 and case.one_card not in self._one_card:
            print(f"{case.name}: not started, {case.one_card.name} has no figure", flush=True)
            return
        self._time(case)

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _time(self, case: Case) -> None:
        began = time.monotonic()
        measured = time_case(case, steps=self._options.steps, seconds=self._left(), cpu=self._options.cpu)
        seconds = time.monotonic() - began
        if measured is None:
            print(f"{case.name}: stopped after {seconds:.0f} s, the time is up", flush=True)
            return
        if "error" not in measured:
            self._slower = max(self._slower, seconds / case.stated_seconds())
            if case.cards == 1:
                self._one_card[case] = measured["tokens_per_second"]
        row = self._row(case, measured, seconds)
        write_json(self.file_of(case), row)
        shown = "failed" if row["efficiency"] is None else f"efficiency {row['efficiency']:.3f}"
        print(f"{case.name}: {seconds:.0f} s (stated {case.stated_seconds():.0f}), {shown}", flush=True)

    def _row(self, case: Case, measured: dict[str, Any], seconds: float) -> dict[str, Any]:
        one, rate = self._one_card.get(case.one_card), measured.get("tokens_per_second")
        return {
            "name": case.name,
            "case": to_dict(case),
            "command": self._options.command,
            "started": self._started,
            "stated_seconds": case.stated_seconds(),
            "seconds": round(seconds, 1),
            "tokens_per_second": rate,
            "one_card_tokens_per_second": one,
            "efficiency": rate / (case.cards * one) if rate and one else None,
            "measured": measured,
        }


def main() -> int:
    """Time what has no result yet."""
    options = tyro.cli(Options, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    session = Session(options)
    cases = [case for case in ranked(options.sizes, options.cards) if options.only in case.name]
    for case in cases:
        if not session.file_of(case).exists():
            session.run(case)
    done = sum(session.file_of(case).exists() for case in cases)
    print(f"{done} of {len(cases)} cases have a result: {options.out}", flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())

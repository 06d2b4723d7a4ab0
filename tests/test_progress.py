"""Bars within bars, on a terminal and in a log file."""

import io
import re
import sys

import numpy as np
import pytest

from duo_jax import progress
from duo_jax.sampling import ticks


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_whole_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress.bar(total=3, desc="outer") as outer:
        inner = progress.passing([1, 2], 2, "inner", unit=" things", show=True)
        for _ in inner:
            inner.refresh()
            outer.refresh()
    lines = log.getvalue().splitlines()
    assert {line.split(":")[0] for line in lines} == {"outer", "inner"}
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_a_passing_bar_has_a_line_of_its_own_and_leaves_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(total=3, desc="outer") as outer:
        inner = progress.passing([1], 1, "inner", unit=" things", show=True)
        assert abs(inner.pos) != abs(outer.pos)
        assert list(inner) == [1]
        assert "inner" not in sys.stderr.getvalue(), "what takes less than a second needs no bar"


def test_a_passing_bar_that_was_shown_is_wiped_out(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(total=3, desc="outer"):
        inner = progress.passing([1], 1, "inner", unit=" things", show=True)
        inner.delay = 0  # as after that second
        inner.refresh()
        assert list(inner) == [1]
        drawn = sys.stderr.getvalue()
        assert "inner" in drawn
        assert re.search(r"\r {20,}", drawn[drawn.rindex("inner") :]), "blanks are the last that is drawn there"


def test_a_notebook_draws_a_bar_in_place(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", io)
    with progress.bar(total=3, desc="steps") as bar:
        bar.refresh()
    assert sys.stderr.getvalue().startswith("\rsteps:")


def test_other_processes_are_quiet(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.passing([1, 2], 2, "inner", unit=" things", show=False)) == [1, 2]
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("steps", [1, 2, 99, 100, 101, 250, 1024])
def test_a_sampler_reports_all_steps_in_few_reports(steps):
    told = np.asarray(ticks.increments(steps))
    assert told.sum() == steps
    assert told.shape == (steps,)
    assert (told >= 0).all()
    assert np.count_nonzero(told) <= 100
    assert told[-1] > 0


def test_step_reports_go_to_one_owner_and_to_none_afterwards():
    heard, late = [], []
    progress.report_steps(np.int32(1), None)  # nobody asked
    with progress.own_step_reports(True) as first, progress.own_step_reports(True) as second:
        assert (first, second) == (True, False)
        progress.listen(heard.append)
        progress.report_steps(np.int32(3), None)
    progress.report_steps(np.int32(4), None)
    assert heard == [3], "a report that comes late moves no bar that is closed"
    with progress.own_step_reports(False) as unwanted, progress.own_step_reports(True) as owner:
        assert (unwanted, owner) == (False, True)
        progress.report_steps(np.int32(5), None)  # not yet listening
        progress.listen(late.append)
        progress.report_steps(np.int32(6), None)
    assert (heard, late) == ([3], [6])

"""Options of the benchmark, its rows as tests, and what it says on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest

from .measure.judge import losses
from .measure.run import OPTIONS, Run, line

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "fusedres's benchmark")
    for name, settings in OPTIONS.items():
        group.addoption(name, **settings)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("pytest-benchmark"):
        config.addinivalue_line("markers", "benchmark: of pytest-benchmark, which is not here")
    try:
        config.stash[RUN] = Run(config.getoption, config.get_terminal_writer().line)
    except ValueError as error:
        raise pytest.UsageError(f"bench: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "task" in metafunc.fixturenames:
        metafunc.parametrize("task", metafunc.config.stash[RUN].tasks, ids=str)


@pytest.fixture
def layers(pytestconfig: pytest.Config) -> Run:
    return pytestconfig.stash[RUN]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[Any]:
    """Ceilings first, the file last; not in a fixture, where what is said is captured."""
    run, rows = session.config.stash[RUN], [i for i in session.items if hasattr(i, "callspec")]
    if not rows or session.config.option.collectonly:
        return (yield)
    run.writes &= bool(run.output) or len(rows) == len(run.tasks)  # -k left some out, as --only
    run.start()
    result = yield
    path = run.finish()
    run.say("" if path is None else f"\nWritten: {path}")
    return result


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """No dots: a row has its own line."""
    quiet = report.outcome != "failed" and "test_layer[" in report.nodeid
    return (report.outcome if report.when == "call" else "", "", "") if quiet else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: Any, call: Any) -> None:
    """The row's line, in red if fused loses; pytest leaves colours out where none are wanted."""
    if call.when == "call" and hasattr(item, "row"):
        run, task = item.config.stash[RUN], item.callspec.params["task"]
        place = f"{run.tasks.index(task) + 1:3}/{len(run.tasks)}"
        told = f"{place} {perf_counter() - run.began:4.0f} s  {line(task, item.row)}"
        item.config.get_terminal_writer().line(told, red=bool(losses([item.row])))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if rows := config.stash[RUN].results["rows"]:
        lost = losses(rows)
        told = "Where fused is slower than eager or torch.compile by more than noise:"
        terminalreporter.write_line(told + ("" if lost else " nowhere"))
        for text in lost:
            terminalreporter.write_line(f"* {text}", red=True)

"""What happens before the command line's packages are there: an interruption, and the names of the package."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupts import heed_interrupts

import isthmus

_SOURCE = str(Path(isthmus.__file__).parents[1])
_SLOW = """
import pathlib, time
pathlib.Path({mark!r}).touch()
try:
    time.sleep(60)
except BaseException:  # as packages do that try an import and go on without
    pass
"""


@pytest.mark.parametrize("start", [["-m", "isthmus"], ["-c", "from isthmus.cli import main; main()"]])
def test_an_interruption_while_packages_are_imported_is_one_line(tmp_path: Path, start: list[str]) -> None:
    mark = tmp_path / "importing"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(_SLOW.format(mark=str(mark)))
    command = subprocess.Popen(
        [sys.executable, *start, "presets"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), _SOURCE])},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (130, "Interrupted; nothing was written.\n")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": _SOURCE},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_public_name_is_there_and_torch_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys, isthmus; assert 'torch' not in sys.modules; "
        "assert set(isthmus.__all__) <= set(dir(isthmus)); "
        "found = [getattr(isthmus, n) for n in isthmus.__all__]; from isthmus import line, merge; "
        "assert isthmus.line is line; print(isthmus.theory.__name__)"
    )
    run = run_python(code)
    assert (run.returncode, run.stdout) == (0, "isthmus.theory\n"), run.stderr
    with pytest.raises(AttributeError, match="module 'isthmus' has no attribute 'nope'"):
        isthmus.nope  # noqa: B018  # pyright: ignore[reportUnusedExpression]


def test_an_interruption_after_the_result_changes_nothing() -> None:
    code = (
        "import atexit, os, signal, sys; from isthmus.cli import main; "
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); sys.argv = ['isthmus', '--version']; main()"
    )
    run = run_python(code)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"isthmus {isthmus.__version__}\n", "")

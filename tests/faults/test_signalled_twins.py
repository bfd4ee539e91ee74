"""A comparison that is asked to stop while it starts a training asks the training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from mpotrain import twins
from mpotrain.errors import EXIT_STOPPED


@pytest.mark.parametrize("child_is_known", [True, False])
def test_sigterm_while_a_child_starts_reaches_the_child(
    monkeypatch: pytest.MonkeyPatch, child_is_known: bool
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    spawn = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        if not child_is_known:
            os.kill(os.getpid(), signal.SIGTERM)
        child = spawn(command)
        started.append(child)
        if child_is_known:
            os.kill(os.getpid(), signal.SIGTERM)
        return child

    monkeypatch.setattr(twins.subprocess, "Popen", start)
    ours: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ours.append(number))
    try:
        program = "import time; time.sleep(60)"
        assert twins._run([sys.executable, "-c", program]) == EXIT_STOPPED
        assert started[0].returncode == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in started:
            child.kill()
    # It was passed on, and the handler from before is there again.
    assert ours == [signal.SIGTERM]

"""Ranks that need no seconds to import PyTorch."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from forked import Forked

from ssaseg.cli.ranks import launcher


def in_ranks(monkeypatch: pytest.MonkeyPatch, count: int, function: Callable[..., object], *given: Any) -> int:
    """Exit code of `function(*given)`, run by `count` ranks."""

    def begin(work: Callable[..., object], env: dict[str, str], start_new_session: bool) -> Forked:
        return Forked(work, env=env)

    monkeypatch.setattr(launcher, "own_command", lambda: partial(function, *given))
    monkeypatch.setattr(launcher, "subprocess", SimpleNamespace(Popen=begin))
    return launcher.run_launch(count)

"""Actors of `predict --engine ray` that die. Ray imports this module in the processes that it starts."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssaseg.cli.prediction.ray_engine import Actor
from ssaseg.cli.prediction.sources import Source


class Dying(Actor):
    """Killed by each image `kill*`, and by each image `once*` the first time that it is met."""

    def reply(self, sources: Sequence[Source]) -> dict[str, Any]:
        for source in sources:
            if Path(source.name).name.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if Path(source.name).name.startswith("once"):
                with suppress(FileExistsError):
                    Path(source.file).with_suffix(".met").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().reply(sources)

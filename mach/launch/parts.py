"""What a worker process does for a re-ranker: orders are as for repetitions, their numbers are those of parts.

Torch is not imported, so a worker starts in half a second.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mach.data.transfer import fetch_store
from mach.errors import ConfigError, MachError
from mach.launch.channel import Channel
from mach.reranking.fitting import RerankerTraining
from mach.storage import Run


def serve(channel: Channel, job: dict[str, Any], is_told_to_stop: Callable[[], bool]) -> None:
    """Make parts of any stage, as `mach.launch.worker.main` trains repetitions, until the driver lets it go."""
    training = RerankerTraining(Run.open(job["run"], job.get("trunk")), fetch_store(job["store"]))
    files = training.files
    with contextlib.suppress(OSError):
        files.local_log.parent.mkdir(parents=True, exist_ok=True)
        with files.local_log.open("a") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
    channel.send({"kind": "ready", "where": job["where"]})
    while True:
        order = channel.receive()
        if order is None or "stop" in order:
            return
        if "pause" in order:
            continue
        try:
            for number in order["train"]:
                if not training.make(*training.part_of(number), lambda: is_told_to_stop() or channel.has_message()):
                    return
            channel.send({"kind": "finished"})
        except Exception as error:
            traceback.print_exc()
            files.keep_log()
            cause = str(error) if isinstance(error, MachError) else f"{type(error).__name__}: {error}"
            hopeless = isinstance(error, ConfigError)
            channel.send({"kind": "failed", "cause": (cause.splitlines() or [""])[0], "hopeless": hopeless})

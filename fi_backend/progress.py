"""Progress of long steps, on stderr. Standard library only: scripts/ loads it before torch is there."""

from __future__ import annotations

import sys
import threading
import time


class Ticker:
    """Says every few seconds that a long step is alive, and how long it took."""

    def __init__(self, title: str) -> None:
        self.title, self.note, self.ok = title, "", True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self._start = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._say("done" if self.ok and kind is None else "failed", end="\n")

    def _run(self) -> None:
        while not self._stop.wait(1 if self._tty else 15):
            self._say(self.note, end="" if self._tty else "\n")

    def _say(self, note: str, end: str) -> None:
        text = f"{self.title}: {time.monotonic() - self._start:.0f} s {note}"
        print(f"\r\033[K{text}" if self._tty else text, end=end, file=sys.stderr, flush=True)

"""Card, driver, commit and date of a results file."""

from __future__ import annotations

import datetime
import os
import subprocess

import torch

from .engine_process import ROOT


def meta(device: torch.device) -> dict[str, str]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    gpu = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": torch.cuda.get_device_name(device) if gpu else "cpu",
        "driver": output(*query).split("\n")[0] if gpu else "",
        "torch": torch.__version__,
        # a copy of the tree on a GPU host has no git history
        "commit": os.environ.get("FI_COMMIT") or output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }

"""What the tests of slurm/ share: a user's site file, and running its scripts."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUBMIT, STAGE, SYNC = (str(ROOT / "slurm" / name) for name in ("submit.sh", "stage.sbatch", "sync_wandb.sh"))


def inherited(folder: Path) -> dict[str, str]:
    """The environment of a user whose site file takes the shipped one and changes what it must."""
    site = folder / "site.sh"
    site.write_text(
        f"source {shlex.quote(str(ROOT))}/slurm/site.sh\n"
        f"ENVIRONMENT=venv:{shlex.quote(sys.prefix)}\nACCOUNT=us\nCPUS_PER_TASK=1\nGRACE=60\nOPTIONS=(--nice=10)\n"
    )
    return os.environ | {"SITE_FILE": str(site), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def bash(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *command], capture_output=True, text=True, timeout=300, check=False, **options)

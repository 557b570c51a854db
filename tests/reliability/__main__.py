"""All of it, with a table of figures: ``python tests/reliability``, or some: ``python tests/reliability kills properties``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

PARTS = {
    "properties": "what holds for every input",
    "bad_inputs": "bad input for every argument of every public function",
    "damaged_folders": "saved models that were damaged",
    "kills": "runs that were killed, and asked for again",
    "full_disk": "writing to a disk that is full",
}


def main() -> int:
    """Run each part in a process of its own, and print its table."""
    chosen = sys.argv[1:] or list(PARTS)
    failed = []
    for name in chosen:
        start = time.monotonic()
        print(f"{name}: {PARTS[name]}", flush=True)
        if subprocess.run(
            [sys.executable, "-W", "ignore", Path(__file__).with_name(f"{name}.py")], check=False
        ).returncode:
            failed.append(name)
        print(f"  {time.monotonic() - start:,.0f} s\n", flush=True)
    print(f"fails: {', '.join(failed)}" if failed else "all as it must be")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())

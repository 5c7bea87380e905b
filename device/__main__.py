"""`python -m device [JOB.json]` is the agent."""

from __future__ import annotations

from device.agent import main

if __name__ == "__main__":
    raise SystemExit(main())

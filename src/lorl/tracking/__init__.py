"""Where a run's numbers go: the console, metrics.jsonl, optional trackers, and the report made of them.

Metric names are `room/name`. Everything under `time/`, `throughput/` and `memory/` depends on the machine; all else is
the same in a run that was stopped and resumed.
"""

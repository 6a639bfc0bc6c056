"""Rewards: built-in graders and the user's functions, run in worker processes that can be killed.

    pool.py         RewardPool: submit requests, get Outcomes; deadlines, respawning          (the trainer's process)
    resolve.py      what will grade which data source, and every mistake that can be found before training
    forkserver.py   the small process that forks workers and ends them with all their descendants
    worker.py       a worker: runs one call at a time under a memory limit                   (forked)
    functions.py    loading and calling a reward function; turning what it returns into an outcome
    graders.py      built-in graders and the registry; mathematics.py: equivalence of mathematical answers
    wire.py         length-prefixed JSON over a socket

This contains accidents (hangs, crashes, memory, children left behind), not malice: a reward function runs as the user
who started the run. Nothing here imports torch except pool.py, so that workers start in milliseconds.
"""

"""What vLLM's scheduler takes of a decoding step, with and without lorl's answers for its block manager.

    PYTHONPATH=src:tests python benchmarks/scheduler_cpu.py [--samples 256] [--tokens 512] [--repeats 5]

vLLM's own scheduler and block manager, without a model: all samples decode at once, in blocks of 16 tokens. Sides take
turns; milliseconds a step, medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from lorl.rollout.vllm import versions
from lorl.rollout.vllm.scheduling import skip_known_answers
from vllm_scheduler import Workload, make_requests, make_scheduler, play, save_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    versions.check()
    versions.prepare(cpu=True)
    work = Workload(1, blocks=100_000, running=args.samples, samples=args.samples, groups=args.samples // 8)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        shape = save_shape(Path(folder))
        for _ in range(args.repeats):
            for quick, taken in seconds.items():
                scheduler, requests = make_scheduler(shape, work, ahead=True), make_requests(work)
                for request in requests:
                    request.max_tokens = args.tokens
                if quick:
                    skip_known_answers(scheduler.kv_cache_manager)
                started = time.perf_counter()
                steps = len(play(scheduler, requests, ahead=True).steps)
                taken.append(1e3 * (time.perf_counter() - started) / steps)
    theirs, ours = (statistics.median(taken) for taken in seconds.values())
    print(f"vLLM {versions.installed()}, {args.samples} samples: vLLM's own {theirs:.2f} ms a step, lorl's {ours:.2f}")
    print(f"ratio {ours / theirs:.2f}; each: {[[round(ms, 2) for ms in taken] for taken in seconds.values()]}")


if __name__ == "__main__":
    main()

"""Run every benchmark, one after the other, then write the report.

    python benchmarks/run_all.py            small sizes, about ten minutes
    python benchmarks/run_all.py --full     the sizes of docs/performance_figures.md, one to two hours, 16 GiB
    python benchmarks/run_all.py --quick    tiny sizes: only to see it work; leaves the report alone

Further options go to the scripts: `--device cuda`, `--threads 2`. `--text-encoder DIRECTORY` adds the step with that
encoder to the one with text features.
"""

import sys
from collections.abc import Sequence

import bench_ema
import bench_queue
import bench_sigmoid
import bench_step
import bench_supcon
import report
from common import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(
        __doc__ or "", arguments, lambda parser: parser.add_argument("--text-encoder", default=None)
    )
    shared = ["--device", options.device, "--threads", str(options.threads), "--out", str(options.out)]
    shared += [f"--{options.size}"] if options.size != "small" else []
    shared += ["--only", *options.only] if options.only else []
    shared += ["--cases", options.cases.pattern, "--seconds", str(options.seconds)]
    for script in (bench_queue, bench_ema, bench_sigmoid, bench_step):
        script.main(shared)
    if options.rest.text_encoder is not None:
        bench_step.main([*shared, "--text-encoder", options.rest.text_encoder])
    bench_supcon.main(shared)
    if options.size != "quick":
        report.main(["--results", str(options.out)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

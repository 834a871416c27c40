"""MTMD (Lin and Hu, IEEE TAFFC 2023) on CMU-MOSI, or on data made here, with the blocks of momentum_distill.

    python examples/mtmd_mosi.py
        train on the synthetic set, about a minute on two CPU cores
    python examples/mtmd_mosi.py --data mosi.pkl --text-encoder bert-base-uncased --seeds 1 2 3 --out runs/mosi
        a pickle in MMSA's layout, three runs, the text encoder by name or local directory
    python examples/mtmd_mosi.py train --config examples/configs/mosi.toml --data mosi.pkl --out runs/paper
        the paper's settings from a file; any option given beside it goes before the file
    python examples/mtmd_mosi.py ablate --arms all --seeds 1 2 3 --out runs/ablation
        another command; `COMMAND --help` explains it
    torchrun --nproc-per-node=2 examples/mtmd_mosi.py --data mosi.pkl --text-encoder bert-base-uncased --out runs/two
        several processes, on CPUs or GPUs; batches, losses and queue are those of one

Training writes results.json, metrics.jsonl, predictions.csv, figures and a checkpoint per seed to --out. The model and
what it minimises stand in mtmd/model.py and mtmd/objective.py, a run of training in mtmd/train.py; how the paper is
read, in docs/paper_map.md.
"""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code. What goes wrong with options, files or data is one line, no traceback."""
    try:
        from rich.console import Console  # here: what is not installed is told as all else is

        from mtmd.settings import cli

        command, parsed, run = cli.parse(sys.argv[1:] if arguments is None else arguments, __doc__ or "")
        from mtmd.runs import processes  # brings torch, which warns where numpy is not installed

        with processes.started(command):
            return run(parsed, Console(quiet=not processes.leads())) or 0
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "mtmd":  # ours: no installation brings it
            raise
        complaint = f'{package} is not installed; pip install "momentum-distill[examples]" brings it'
    except (ValueError, OSError, FloatingPointError) as error:  # options, data, settings, a loss of NaN
        complaint = str(error)
    except KeyboardInterrupt:
        return 130
    print("error:", " ".join(complaint.split("\n")), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""Writes down what the tests hold fast: public names and arguments, and what each refusal says, over ranks too.

    python tests/pin.py
    python tests/pin.py --kernels   # instead, what each kernel may take of a GPU: it compiles them all, minutes

Read the difference before you commit it: it is a change for users.
"""

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
COMMAND = "python tests/pin.py"


def pin_calls() -> None:
    import test_bad_inputs
    import test_distributed_blocks
    import test_integrations
    from pinned import write, write_lines
    from public_names import PINNED, found
    from ranks import Ranks

    write_lines(PINNED, [*found(), *found(test_integrations.modules())], command=COMMAND)
    write(test_bad_inputs.MESSAGES, test_bad_inputs.messages(), command=COMMAND)
    ranks = Ranks()
    write(test_distributed_blocks.MESSAGES, test_distributed_blocks.messages(ranks), command=COMMAND)
    ranks.close()


def pin_kernels() -> None:
    import test_lean

    test_lean.write()


if __name__ == "__main__":
    sys.path += [str(TESTS / folder) for folder in ("shared", "blocks", "contrast", "ema")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true")
    (pin_kernels if parser.parse_args().kernels else pin_calls)()

"""Writes down what the tests hold fast: public names and arguments, and what each refusal says, over ranks too.

    python tests/pin.py

Read the difference before you commit it: it is a change for users.
"""

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


if __name__ == "__main__":
    sys.path += [str(TESTS / folder) for folder in ("shared", "blocks", "contrast", "ema")]
    pin_calls()

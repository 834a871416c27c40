"""Writes down what the tests hold fast: public names and arguments, and what each refusal says, over ranks too.

    python tests/pin.py

Read the difference before you commit it: it is a change for users.
"""

import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def pin(path: Path, messages: dict[str, str]) -> None:
    path.write_text(json.dumps(messages, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    sys.path += [str(TESTS / folder) for folder in ("shared", "blocks", "ema")]
    import test_bad_inputs
    import test_distributed_blocks
    import test_integrations
    from public_names import PINNED, found
    from ranks import Ranks

    names = [*found(), *found(test_integrations.modules())]
    PINNED.write_text("\n".join(names) + "\n", encoding="utf-8")
    pin(test_bad_inputs.MESSAGES, test_bad_inputs.messages())
    ranks = Ranks()
    pin(test_distributed_blocks.MESSAGES, test_distributed_blocks.messages(ranks))
    ranks.close()


if __name__ == "__main__":
    main()

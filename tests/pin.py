"""Writes down what the tests hold fast: public names and arguments, and what each refusal says.

    python tests/pin.py

Read the difference before you commit it: it is a change for users.
"""

import json

import test_bad_inputs
import test_public_api


def main() -> None:
    test_public_api.PINNED.write_text("\n".join(test_public_api.found()) + "\n", encoding="utf-8")
    messages = json.dumps(test_bad_inputs.messages(), indent=0, ensure_ascii=False)
    test_bad_inputs.MESSAGES.write_text(messages + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""lm-eval's own command line, with the model "anee": ``python -m anee.lm_eval --model anee --model_args ...``.

Versions of lm-eval that look for models in installed packages need no such help.
"""

from __future__ import annotations

import sys

from anee_core.errors import AneeError, MissingPackageError


def main() -> None:
    """Run lm-eval with the arguments of this process; an error of ANEE's is one line."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate

            import anee.lm_eval.harness  # noqa: F401  # registers the model
        except ImportError as error:
            raise MissingPackageError("evaluation needs lm-eval: pip install 'anee[eval]'") from error
        cli_evaluate()
    except AneeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

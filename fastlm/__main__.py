"""The command `fastlm`. `run` needs none of the packages that the others do."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        from fastlm.run import main as run

        run(sys.argv[2:])
    else:
        from fastlm.cli import main as cli

        cli()


if __name__ == "__main__":
    main()

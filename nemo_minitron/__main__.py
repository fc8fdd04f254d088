"""``minitron <stage> key=value ...``, also as ``python -m nemo_minitron``."""

import sys

from nemo_minitron.runtime import endings
from nemo_minitron.runtime.errors import Ending


def main() -> int:
    """Run the command line of this process; signals are taken before anything else is imported."""
    command = " ".join(["minitron", *sys.argv[1:2]])
    try:
        endings.begin(command)  # inside: a signal may come before it returns
        from nemo_minitron import cli

        return cli.main()
    except (KeyboardInterrupt, Ending) as error:
        return endings.say(command, error)
    except Exception as error:
        if endings.asked() is None:
            raise
        return endings.say(command, error)  # what a library made of it
    finally:
        endings.end()


if __name__ == "__main__":
    sys.exit(main())

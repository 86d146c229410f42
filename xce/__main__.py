"""``python -m xce`` is the command ``xce``."""

from xce.cli import main

if __name__ == "__main__":
    main()

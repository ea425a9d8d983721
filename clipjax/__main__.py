"""Lets `python -m clipjax COMMAND` run `clipjax COMMAND`; see `clipjax.cli`."""

import sys

from clipjax.cli import main

if __name__ == "__main__":
  sys.exit(main())

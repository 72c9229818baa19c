"""``python -m mrelease``: the command."""

from ._cli import main

raise SystemExit(main())

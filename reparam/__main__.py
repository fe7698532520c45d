"""``python -m reparam``."""

from reparam.cli import main

raise SystemExit(main())

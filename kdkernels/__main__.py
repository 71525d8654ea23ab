"""``python -m kdkernels``."""

from kdkernels.api.cli import main

main()

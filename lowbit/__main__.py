"""`python -m lowbit`."""

from lowbit.pipeline.__main__ import main

main()

"""`python -m lowbit`."""

from lowbit.pipeline.__main__ import main

if __name__ == "__main__":
    main()

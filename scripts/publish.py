"""The same as `lpc-runner publish`."""

from lpc_runner.publish import main

if __name__ == "__main__":
    main()

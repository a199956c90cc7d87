"""`python -m trl_miso` is `trl-miso`."""

from trl_miso.cli.main import main

if __name__ == "__main__":
    main()

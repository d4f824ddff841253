"""`python -m moefy_hf.cli`, which is `moefy`."""

from .main import main

if __name__ == "__main__":
    main()

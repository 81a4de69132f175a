"""`python -m qdora COMMAND`, which `accelerate launch -m` takes where there is no checkout with launch/."""

from qdora.cli import main

if __name__ == "__main__":
    main()

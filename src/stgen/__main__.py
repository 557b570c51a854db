"""``python -m stgen --out demo-output``: the demonstration that ``make demo`` runs."""

from stgen._demo import main

if __name__ == "__main__":
    main()

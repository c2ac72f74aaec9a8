"""`python -m eclip.dataloading.demo --out data/demo`: pack the embedded catalogue."""

from .pack import main

if __name__ == "__main__":
    main()

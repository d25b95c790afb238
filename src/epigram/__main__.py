"""`python -m epigram`, which torchrun needs: torchrun --nproc_per_node 8 -m epigram train pr1212."""

from epigram.cli.main import main

if __name__ == "__main__":
    main()

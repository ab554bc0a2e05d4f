"`python -m fastsb.bench COMMAND`"
from fastsb.bench.command import main

if __name__ == "__main__":
    main()

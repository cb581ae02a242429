"""How a recipe runs: files, processes, caches, runtimes. `passes` knows nothing of this package."""
